"""Latent attention in its expanded form says what the absorbed form says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kernels.testing import make_step
from rempart_engine.model.deepseek.expanded import only, whole_pieces
from rempart_engine.model.deepseek.testing import TINY, oracle, write_checkpoint
from rempart_engine.offline import LLM, SamplingParams

TOP_K = 64
CONFIG = replace(TINY, indexer=replace(TINY.indexer, num_heads=33, top_k=TOP_K), num_mtp_layers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("expanded")
    write_checkpoint(path, CONFIG, dtype="float32")
    return path


def test_pieces_are_sequences_with_enough_new_tokens_that_see_everything() -> None:
    step = make_step([(70, 5), (40, 40), (9, 2), (64, 30)], num_blocks=8)
    counts = (step.positions + 1).clamp(max=TOP_K)
    selection = Selection(torch.zeros(len(counts), TOP_K, dtype=torch.int32), counts)
    assert list(whole_pieces(step, selection, 3)) == [slice(5, 45), slice(47, 77)]
    assert list(whole_pieces(step, selection, 31)) == [slice(5, 45)]
    rest = torch.ones(len(counts), dtype=torch.bool)
    rest[5:45] = False
    part, chosen = only(step, selection, rest)
    assert part.token_rows.tolist() == [0] * 5 + [2] * 2 + [3] * 30
    assert torch.equal(chosen.counts, counts[rest])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("max_step_tokens", [256, 24])
def test_the_expanded_form_changes_no_token_and_hardly_a_logprob(
    folder: Path, kv_cache_dtype: str, max_step_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 3, 30, 64, 65, 90)
    prompts = [torch.randint(0, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    asked = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    options = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "max_step_tokens": max_step_tokens}
    absorbed, expanded = (
        LLM(folder, **options, expand_prefill_from=least).generate(prompts, asked) for least in (None, 2)
    )
    for ours, expected in zip(expanded, absorbed, strict=True):
        assert ours.token_ids == expected.token_ids
        for got, wanted in zip(ours.logprobs, expected.logprobs, strict=True):
            assert got == pytest.approx(wanted, abs=1e-4)


def test_the_expanded_form_equals_transformers(folder: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, CONFIG.vocab_size, (TOP_K,), generator=generator).tolist()
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    llm = LLM(folder, dtype="float32", expand_prefill_from=2, max_step_tokens=40)
    (generation,) = llm.generate([prompt], asked)
    with torch.inference_mode():
        logprobs = oracle(folder)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    ours = [entry[token_id] for entry, token_id in zip(generation.prompt_logprobs, prompt[1:], strict=True)]
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert (torch.tensor(ours) - expected).abs().max().item() < 1e-4
