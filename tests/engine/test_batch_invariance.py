"""A sequence gets the same bits whoever computes beside it: seeds repeat texts, replays repeat tokens."""

from pathlib import Path

import numpy as np
import pytest

from rempart_engine.offline import LLM, SamplingParams

NUM_NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def llm(request: pytest.FixtureRequest, smollm2: Path) -> LLM:
    return LLM(smollm2, dtype=request.param, max_step_tokens=256, enable_prefix_cache=False)


def _prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, 49_152, length).tolist() for length in random.integers(1, 200, count)]


def _sampled(seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, top_p=0.95, seed=seed, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=2
    )


@pytest.mark.parametrize("num_companions", [1, 16])
def test_companions_change_neither_a_seeded_text_nor_a_bit_of_its_logprobs(llm: LLM, num_companions: int) -> None:
    prompt, *others = _prompts(1 + num_companions)
    (alone,) = llm.generate([prompt], _sampled(11))
    together = llm.generate([*others, prompt], [_sampled(seed) for seed in [*range(100, 100 + num_companions), 11]])
    assert together[-1].token_ids == alone.token_ids
    assert together[-1].logprobs == alone.logprobs


def test_other_seeds_and_other_choices_give_other_texts(llm: LLM) -> None:
    (prompt,) = _prompts(1)
    texts = [llm.generate([prompt], _sampled(seed))[0].token_ids for seed in (1, 2)]
    (three,) = llm.generate([prompt], SamplingParams(seed=1, n=3, max_tokens=NUM_NEW_TOKENS, ignore_eos=True))
    texts += [choice.token_ids for choice in three.choices]
    assert len({tuple(text) for text in texts}) == len(texts)


def test_a_continuation_from_emitted_tokens_draws_the_same_tokens(llm: LLM) -> None:
    (prompt,) = _prompts(1)
    (whole,) = llm.generate([prompt], _sampled(5))
    for cut in (1, 9, 23):
        (rest,) = llm.generate([prompt], _sampled(5), [whole.token_ids[:cut]])
        assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids


def test_prompt_logprobs_are_the_same_for_a_prompt_that_is_cut_into_chunks(llm: LLM) -> None:
    random = np.random.default_rng(4)
    long, prompt = (random.integers(3, 49_152, length).tolist() for length in (180, 150))
    asked = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    (whole,) = llm.generate([prompt], asked)
    _, chunked = llm.generate([long, prompt], [_sampled(1), asked])  # 330 tokens do not fit one step of 256
    assert len(whole.prompt_logprobs) == len(prompt) - 1
    assert all(token_id in entry for token_id, entry in zip(prompt[1:], whole.prompt_logprobs, strict=True))
    assert (chunked.prompt_logprobs, chunked.token_ids) == (whole.prompt_logprobs, whole.token_ids)
