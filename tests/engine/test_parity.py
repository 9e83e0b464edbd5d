"""The engine against transformers on a real model in float32, by every way that a token can come to be computed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rempart_engine.offline import LLM, Generation, SamplingParams

NUM_PROMPTS = 32
LONGEST_PROMPT = 700
CHOSEN_LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, LONGEST_PROMPT)
NUM_NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=0)
NUM_BRIEF_TOKENS = 12
BRIEF = replace(GREEDY, max_tokens=NUM_BRIEF_TOKENS)
"""Where only the way that a prompt is computed differs: its block borders and the first tokens after them show it."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(900),  # the first test compiles, and computes what all compare with
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """32 prompts of 1 to 700 random tokens; several lengths lie on and beside block borders."""
    random = np.random.default_rng(7)
    lengths = list(CHOSEN_LENGTHS)
    lengths += random.integers(1, LONGEST_PROMPT, NUM_PROMPTS - len(lengths)).tolist()
    return [random.integers(3, 49_152, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    """It keeps blocks of what it has computed, and so of everything in `together`."""
    return LLM(smollm2, dtype="float32", max_step_tokens=1024)


@pytest.fixture(scope="module")
def together(llm: LLM, prompts: list[list[int]]) -> list[Generation]:
    """All prompts at once, for the first time."""
    return llm.generate(prompts, GREEDY)


def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    smollm2: Path, prompts: list[list[int]], together: list[Generation]
) -> None:
    # If every output token is the oracle's most likely one after all tokens before it, then the oracle generates the
    # same sequence, by induction; one forward pass over prompt and output asks for all of them at once.
    auto: Any = AutoModelForCausalLM
    oracle = auto.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    for prompt, generation in zip(prompts, together, strict=True):
        assert len(generation.token_ids) == NUM_NEW_TOKENS
        with torch.inference_mode():
            asked = torch.tensor([prompt + generation.token_ids])
            logits = oracle(asked, logits_to_keep=NUM_NEW_TOKENS + 1).logits[0, :-1]
        assert generation.token_ids == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).amax(-1)
        ours = torch.tensor([next(iter(entry.values())) for entry in generation.logprobs])
        assert (ours - expected).abs().max().item() < 1e-4


def test_a_second_time_from_the_prefix_cache_changes_no_token(
    llm: LLM, prompts: list[list[int]], together: list[Generation]
) -> None:
    again = llm.generate(prompts, BRIEF)
    assert first_tokens(again) == first_tokens(together)
    for prompt, result in zip(prompts, again, strict=True):
        assert result.num_cached_tokens == (len(prompt) - 1) // 64 * 64


def test_a_prompt_alone_and_whole_in_one_step_says_the_same(
    smollm2: Path, prompts: list[list[int]], together: list[Generation]
) -> None:
    """Those of the lengths that were chosen; the slow test has all of them to the last token."""
    llm = LLM(smollm2, dtype="float32", max_step_tokens=1024, enable_prefix_cache=False)
    alone = [llm.generate([prompt], BRIEF)[0] for prompt in prompts[: len(CHOSEN_LENGTHS)]]
    assert first_tokens(alone) == first_tokens(together[: len(CHOSEN_LENGTHS)])


def first_tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids[:NUM_BRIEF_TOKENS] for generation in generations]


@pytest.mark.slow  # minutes of the same that test_batch_invariance shows bit by bit
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_step_tokens": 1024}, id="alone"),
        pytest.param({"max_step_tokens": 1024}, id="all together"),
        pytest.param({"max_step_tokens": 32}, id="prefill in chunks of 32"),
        pytest.param({"max_step_tokens": 512, "num_blocks": 40, "watermark": 0.0}, id="preempted in a small pool"),
        pytest.param({"max_step_tokens": 1024, "enable_prefix_cache": True}, id="a second time from the prefix cache"),
    ],
)
def test_the_way_through_the_engine_changes_no_token(
    request: pytest.FixtureRequest,
    smollm2: Path,
    prompts: list[list[int]],
    together: list[Generation],
    options: dict[str, Any],
) -> None:
    """All prompts, to the last token."""
    llm = LLM(smollm2, dtype="float32", **{"enable_prefix_cache": False, **options})
    expected = [result.token_ids for result in together]
    if request.node.callspec.id == "alone":
        results = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
    else:
        results = llm.generate(prompts, GREEDY)
    assert [result.token_ids for result in results] == expected
    if "enable_prefix_cache" in options:
        assert [result.token_ids for result in llm.generate(prompts, GREEDY)] == expected
        assert llm.load().counters.num_prefix_cache_hit_tokens > 0
    if "num_blocks" in options:
        assert llm.load().counters.num_preemptions > 0
