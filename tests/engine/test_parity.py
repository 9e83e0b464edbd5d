"""The engine against transformers on a real model in float32, by every way that a token can come to be computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rempart_engine.offline import LLM, Generation, SamplingParams

NUM_PROMPTS = 32
LONGEST_PROMPT = 700
NUM_NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(900),  # the first test compiles, and computes what all compare with
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """32 prompts of 1 to 700 random tokens; several lengths lie on and beside block borders."""
    random = np.random.default_rng(7)
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, LONGEST_PROMPT]
    lengths += random.integers(1, LONGEST_PROMPT, NUM_PROMPTS - len(lengths)).tolist()
    return [random.integers(3, 49_152, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def alone(smollm2: Path, prompts: list[list[int]]) -> list[Generation]:
    """Each prompt for itself, whole in one step."""
    llm = LLM(smollm2, dtype="float32", max_step_tokens=1024, enable_prefix_cache=False)
    return [llm.generate([prompt], GREEDY)[0] for prompt in prompts]


def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    smollm2: Path, prompts: list[list[int]], alone: list[Generation]
) -> None:
    # If every output token is the oracle's most likely one after all tokens before it, then the oracle generates the
    # same sequence, by induction; one forward pass over prompt and output asks for all of them at once.
    auto: Any = AutoModelForCausalLM
    oracle = auto.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    for prompt, generation in zip(prompts, alone, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1]
        assert generation.token_ids == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).amax(-1)
        ours = torch.tensor([next(iter(entry.values())) for entry in generation.logprobs])
        assert (ours - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_step_tokens": 1024}, id="all together"),
        # Minutes of the same that test_batch_invariance shows bit by bit.
        pytest.param({"max_step_tokens": 32}, id="prefill in chunks of 32", marks=pytest.mark.slow),
        pytest.param(
            {"max_step_tokens": 512, "num_blocks": 40, "watermark": 0.0},
            id="preempted in a small pool",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_way_through_the_engine_changes_no_token(
    smollm2: Path, prompts: list[list[int]], alone: list[Generation], options: dict[str, Any]
) -> None:
    llm = LLM(smollm2, dtype="float32", enable_prefix_cache=False, **options)
    results = llm.generate(prompts, GREEDY)
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]
    if "num_blocks" in options:
        assert llm.load().counters.num_preemptions > 0


def test_a_second_time_from_the_prefix_cache_changes_no_token(
    smollm2: Path, prompts: list[list[int]], alone: list[Generation]
) -> None:
    llm = LLM(smollm2, dtype="float32", max_step_tokens=1024)
    expected = [result.token_ids for result in alone]
    assert [result.token_ids for result in llm.generate(prompts, GREEDY)] == expected
    again = llm.generate(prompts, GREEDY)
    assert [result.token_ids for result in again] == expected
    for prompt, result in zip(prompts, again, strict=True):
        assert result.num_cached_tokens == (len(prompt) - 1) // 64 * 64
