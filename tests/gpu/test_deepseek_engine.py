"""The engine on the GPU path with a small DeepSeek: every kind of numbers, compact caches, drafts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rempart_engine.model.deepseek.config import Fp8Blocks
from rempart_engine.model.deepseek.testing import TINY, oracle, write_checkpoint
from rempart_engine.model.errors import ModelError
from rempart_engine.offline import LLM, SamplingParams

CONFIG = replace(
    TINY,
    num_layers=2,
    num_dense_layers=1,
    indexer=replace(TINY.indexer, is_full=(True, True)),
    fp8=Fp8Blocks(128, 128),
)
OPTIONS: dict[str, Any] = {"device": "cuda", "num_blocks": 8, "max_num_rows": 4, "max_graph_tokens": 0}
PROMPT = [(5 * place + 2) % CONFIG.vocab_size for place in range(CONFIG.indexer.top_k + 6)]
SEEN_WHOLE = PROMPT[: CONFIG.indexer.top_k]
"""Coarse index keys may choose other tokens, whose values in a random model are quite others."""

pytestmark = pytest.mark.timeout(900)  # the interpreter takes minutes on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp8 with blocks of scales, as published; with an MTP layer."""
    path = tmp_path_factory.mktemp("deepseek")
    write_checkpoint(path, CONFIG)
    return path


def next_logprobs(folder: Path, **options: Any) -> torch.Tensor:  # [V]
    """Log-probabilities after the prompt."""
    llm = LLM(folder, **{**OPTIONS, "num_speculative_tokens": 0, "max_logprobs": CONFIG.vocab_size, **options})
    asked = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=CONFIG.vocab_size)
    (entry,) = llm.generate([SEEN_WHOLE], asked)[0].logprobs
    return torch.tensor([entry[token] for token in range(CONFIG.vocab_size)])


@pytest.mark.parametrize(
    ("dtype", "cache", "bound"),
    [
        pytest.param("float32", "auto", 1e-5, id="float32"),
        pytest.param("bfloat16", "auto", 0.01, id="bfloat16"),
        pytest.param("auto", "fp8", 0.06, id="fp8 with compact caches"),
        pytest.param("int8", "auto", 0.015, id="experts in int8"),
        pytest.param("int4", "auto", 0.06, id="experts in int4"),
    ],
)
def test_every_kind_of_numbers_is_close_to_float32(folder: Path, dtype: str, cache: str, bound: float) -> None:
    """The bound is on the mean deviation in parts of the spread of the log-probabilities."""
    ours = next_logprobs(folder, dtype=dtype, kv_cache_dtype=cache)
    with torch.inference_mode():
        expected = oracle(folder)(torch.tensor([SEEN_WHOLE])).logits[0, -1].log_softmax(-1)
    deviation = ((ours - expected).abs().mean() / expected.std()).item()
    assert deviation < bound
    if dtype != "float32":
        assert deviation > bound / 100, "numbers as coarse as these show"


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), id="greedy"),
        pytest.param(SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=4, ignore_eos=True), id="sampled"),
    ],
)
def test_drafts_change_no_text(folder: Path, sampling: SamplingParams) -> None:
    texts = {}
    for num_drafts in (0, 2):
        llm = LLM(folder, **{**OPTIONS, "max_graph_tokens": 2}, dtype="float32", num_speculative_tokens=num_drafts)
        texts[num_drafts] = [each.token_ids for each in llm.generate([PROMPT, PROMPT[:3]], sampling)]
        assert (llm.load().counters.num_draft_tokens > 0) is (num_drafts > 0)
    assert texts[0] == texts[2]


def test_the_expanded_form_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="expand_prefill_from"):
        LLM(folder, **OPTIONS, expand_prefill_from=64)
