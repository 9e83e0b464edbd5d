"""A DeepSeek model of random weights with its MTP layer: drafts change no token, on the way and at the very end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rempart_engine.model.deepseek.testing import TINY, write_checkpoint
from rempart_engine.offline import LLM, SamplingParams

NUM_PROMPTS = 64
MAX_MODEL_LEN = 64
ALMOST_CERTAIN = SamplingParams(temperature=0.0, ignore_eos=True, logit_bias={7: 100.0})
"""Model and drafts say the same token, so that every draft is accepted."""

Outputs = list[list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, TINY)
    return path


def load(folder: Path, num_speculative_tokens: int) -> LLM:
    return LLM(
        folder,
        dtype="float32",
        num_blocks=100,
        max_step_tokens=256,
        max_model_len=MAX_MODEL_LEN,
        num_speculative_tokens=num_speculative_tokens,
        max_speculative_rows=NUM_PROMPTS,
    )


def outputs(llm: LLM) -> Outputs:
    """Of 64 prompts, every second one greedy; the others with draws of all kinds."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, TINY.vocab_size, size).tolist() for size in random.integers(2, 40, NUM_PROMPTS)]
    drawn = SamplingParams(temperature=0.5, max_tokens=12, ignore_eos=True)
    sampling = [
        replace(drawn, seed=number, temperature=0.5 * (number % 2), top_p=0.9 if number % 3 else 1.0)
        for number in range(NUM_PROMPTS)
    ]
    return [generation.token_ids for generation in llm.generate(prompts, sampling)]


@pytest.fixture(scope="module")
def outputs_without_drafts(folder: Path) -> Outputs:
    return outputs(load(folder, 0))


@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_64_prompts_say_the_same_with_and_without_drafts(
    folder: Path, outputs_without_drafts: Outputs, num_speculative_tokens: int
) -> None:
    llm = load(folder, num_speculative_tokens)
    assert outputs(llm) == outputs_without_drafts
    counters = llm.load().counters
    assert 0 < counters.num_accepted_draft_tokens < counters.num_draft_tokens


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
