"""DeepSeek models with their MTP layer: drafts change no token and no bit, and the layer computes what it should."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.stepping import Stepper
from rempart_engine.model.deepseek.testing import TINY, TINY_GLM, oracle, stored_tensors, write_checkpoint
from rempart_engine.offline import LLM, SamplingParams

NUM_PROMPTS = 64
MAX_MODEL_LEN = 64
ALMOST_CERTAIN = SamplingParams(temperature=0.0, ignore_eos=True, logit_bias={7: 100.0})
"""Model and drafts say the same token, so that every draft is accepted."""

FEWEST_AND_MOST = [1, pytest.param(2, marks=pytest.mark.slow), 3]

Outputs = list[tuple[list[int], list[dict[int, float]]]]
"""Token ids and their log-probabilities."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, TINY)
    return path


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token follows almost from the last one alone, as its MTP layer knows: drafts are often right.

    What layers add is small beside the embedding, and the MTP layer joins by passing the embedding on.
    """
    path = tmp_path_factory.mktemp("agreeing")
    write_checkpoint(path, TINY, dtype="float32", num_shards=1)

    def agree(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor * 0.05
        if name.endswith("eh_proj.weight"):
            return torch.eye(*tensor.shape)
        return torch.ones_like(tensor) if name.endswith(("norm.weight", "enorm.weight")) else tensor

    rewrite(path, path, agree)
    return path


def rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Write a checkpoint of one shard anew with changed tensors, without those that become None."""
    (file,) = source.glob("*.safetensors")
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, target / file.name)


def load(folder: Path, num_speculative_tokens: int, **options: Any) -> LLM:
    defaults = {"num_blocks": 100, "max_step_tokens": 256, "max_model_len": MAX_MODEL_LEN}
    return LLM(
        folder,
        dtype="float32",
        num_speculative_tokens=num_speculative_tokens,
        **{"max_speculative_rows": NUM_PROMPTS, **defaults, **options},
    )


def outputs(llm: LLM, num_prompts: int = NUM_PROMPTS, longest: int = 40, least_tokens: int = 8) -> Outputs:
    """Of each prompt a greedy answer and one with draws of some kind."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, TINY.vocab_size, size).tolist() for size in random.integers(2, longest, num_prompts)]
    greedy = [
        SamplingParams(temperature=0.0, max_tokens=least_tokens + n % 12, ignore_eos=True, logprobs=2)
        for n in range(num_prompts)
    ]
    drawn = [replace(params, temperature=0.5, seed=n, top_p=0.9 if n % 3 else 1.0) for n, params in enumerate(greedy)]
    generations = llm.generate([*prompts, *prompts], [*greedy, *drawn])
    return [(generation.token_ids, generation.logprobs) for generation in generations]


@pytest.fixture(scope="module")
def without_drafts(folder: Path, agreeing: Path) -> Mapping[Path, Outputs]:
    return {path: outputs(load(path, 0)) for path in (folder, agreeing)}


@pytest.mark.parametrize("num_speculative_tokens", FEWEST_AND_MOST)
def test_64_prompts_say_the_same_with_and_without_drafts(
    folder: Path, without_drafts: Mapping[Path, Outputs], num_speculative_tokens: int
) -> None:
    """Of random weights few drafts are right, and nearly all are rejected."""
    llm = load(folder, num_speculative_tokens)
    assert outputs(llm) == without_drafts[folder]
    counters = llm.load().counters
    assert 0 < counters.num_accepted_draft_tokens < counters.num_draft_tokens


@pytest.mark.parametrize("num_speculative_tokens", FEWEST_AND_MOST)
def test_64_prompts_say_the_same_where_drafts_are_often_right(
    agreeing: Path, without_drafts: Mapping[Path, Outputs], num_speculative_tokens: int
) -> None:
    llm = load(agreeing, num_speculative_tokens)
    assert outputs(llm) == without_drafts[agreeing]
    counters = llm.load().counters
    assert 0.5 * counters.num_draft_tokens < counters.num_accepted_draft_tokens < counters.num_draft_tokens


# Where drafts are often right, many are rejected too; where nearly all are, nothing else comes up.
@pytest.mark.parametrize("which", [pytest.param("folder", marks=pytest.mark.slow), "agreeing"])
def test_preemption_and_prefix_cache_change_nothing_beside_drafts(request: pytest.FixtureRequest, which: str) -> None:
    path: Path = request.getfixturevalue(which)
    expected = outputs(load(path, 0, enable_prefix_cache=False, max_model_len=256), 16, 150, 30)
    crowded = load(path, 3, num_blocks=7, max_step_tokens=40, watermark=0.0, max_model_len=256)
    assert outputs(crowded, 16, 150, 30) == expected
    assert crowded.load().counters.num_preemptions > 0
    roomy = load(path, 3, max_model_len=256)
    for _ in range(2):
        assert outputs(roomy, 16, 150, 30) == expected
    assert roomy.load().counters.num_prefix_cache_hit_tokens > 0
    for llm in (crowded, roomy):
        assert llm.load().counters.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("max_speculative_rows", [1, 5])
def test_drafts_may_begin_and_end_in_the_middle(
    agreeing: Path, without_drafts: Mapping[Path, Outputs], max_speculative_rows: int
) -> None:
    """They begin when enough sequences have ended, and stop while new ones come in."""
    llm = load(agreeing, 2, max_speculative_rows=max_speculative_rows, max_num_rows=7)
    assert outputs(llm) == without_drafts[agreeing]
    counters = llm.load().counters
    assert 0 < counters.num_draft_tokens < counters.num_output_tokens / 2


@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_accepted_drafts_lead_to_the_last_place_of_the_longest_sequence(
    folder: Path, num_speculative_tokens: int
) -> None:
    llm = load(folder, num_speculative_tokens)
    prompts = [[3] * size for size in (1, 2, 3, 4)]
    for prompt, generation in zip(prompts, llm.generate(prompts, ALMOST_CERTAIN), strict=True):
        assert generation.token_ids == [7] * (MAX_MODEL_LEN - len(prompt))
    counters = llm.load().counters
    assert counters.num_accepted_draft_tokens == counters.num_draft_tokens > 0


# The layer itself.


MTP_CASES = {
    "deepseek": replace(TINY, indexer=replace(TINY.indexer, num_heads=13)),
    "glm": replace(TINY_GLM, indexer=replace(TINY_GLM.indexer, num_heads=13)),
}


class SlowMTP:
    """The MTP layer from its published tensors, in plain torch around a decoder layer of `transformers`.

    It takes all inputs of the layer so far at once, and has no cache.
    """

    def __init__(self, folder: Path, config: DeepseekConfig) -> None:
        prefix = f"model.layers.{config.num_layers}."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in stored_tensors(folder).items()
            if name.startswith(prefix)
        }
        self._eps = config.rms_norm_eps
        self._own = {name: tensor for name, tensor in own.items() if not name.startswith(("self_attn", "mlp"))}
        deeper = folder / "deeper"
        deeper.mkdir()
        fields = json.loads((folder / "config.json").read_bytes())
        fields |= {"num_hidden_layers": config.num_layers + 1, "num_nextn_predict_layers": 0}
        if "indexer_types" in fields:
            fields["indexer_types"].append("full")
        (deeper / "config.json").write_text(json.dumps(fields))
        extra = {prefix + name for name in self._own if not name.endswith("layernorm.weight")}
        rewrite(folder, deeper, lambda name, tensor: None if name in extra else tensor)
        self._model: Any = oracle(deeper).get_submodule("model")

    @torch.inference_mode()
    def hidden(self, hidden: torch.Tensor, next_token_ids: torch.Tensor) -> torch.Tensor:  # [S, W], [S] -> [S, W]
        positions = torch.arange(len(hidden))
        embedded = self._own["embed_tokens.weight"][next_token_ids].clone()
        embedded[0] = 0.0
        joined = torch.cat((self._norm(embedded, "enorm"), self._norm(hidden, "hnorm")), 1)
        x = (joined @ self._own["eh_proj.weight"].T)[None]
        is_hidden = positions[None, :] > positions[:, None]
        mask = torch.zeros(is_hidden.shape).masked_fill(is_hidden, torch.finfo(torch.float32).min)
        outcome = self._model.layers[-1](
            x,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            position_embeddings=self._model.rotary_emb(x, positions[None]),
        )
        return self._norm((outcome[0] if isinstance(outcome, tuple) else outcome)[0], "shared_head.norm")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self._own["shared_head.head.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._own[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + self._eps).rsqrt()


@pytest.mark.parametrize("name", MTP_CASES)
def test_the_mtp_layer_computes_what_its_description_says(tmp_path: Path, name: str) -> None:
    """Over a whole prompt, and again from its own results, as the second and third draft are made."""
    config = MTP_CASES[name]
    write_checkpoint(tmp_path, config, dtype="float32", num_shards=1)
    stepper, slow = Stepper(tmp_path), SlowMTP(tmp_path, config)
    token_ids = np.random.default_rng(1).integers(0, config.vocab_size, 64).tolist()
    num_known, later = 60, torch.tensor(token_ids[1:])
    stepper.start(0, token_ids)
    inputs = stepper.inputs({0: num_known})
    stepper.step({0: num_known})
    given, ours = stepper.hidden, stepper.hidden
    with torch.inference_mode():
        for number in range(3):
            first = 0 if number == 0 else num_known + number - 1
            stop = num_known + number
            ours = stepper.model.look_further(ours, later[first:stop], inputs, stepper.storage)
            expected = slow.hidden(given, later[:stop])
            torch.testing.assert_close(ours, expected[first:], atol=1e-4, rtol=0)
            torch.testing.assert_close(stepper.model.logits(ours), slow.logits(expected[first:]), atol=1e-4, rtol=0)
            ours = ours[-1:]
            given = torch.cat((given, ours))
            inputs = stepper.inputs({0: 1})
            stepper.step({0: 1})
