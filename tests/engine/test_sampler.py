"""The sampler against a slow one that takes a row at a time, and what it promises of rows side by side."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rempart_engine.core.request import InvalidRequestError, SamplingParams
from rempart_engine.core.step import NewRow, TokenLogprob
from rempart_engine.logprobs import prompt_logprobs
from rempart_engine.nucleus import first_exceeding, keep_nucleus
from rempart_engine.philox import uniforms
from rempart_engine.sampler import Sampled, sample
from rempart_engine.sampling_rows import SamplingRows

EOS = (2,)
GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: its parameters and its tokens."""

    sampling: SamplingParams
    prompt: tuple[int, ...] = (1, 3)
    output: tuple[int, ...] = ()
    choice: int = 0

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def new_row(self, row: int) -> NewRow:
        return NewRow(row, self.prompt + self.output, len(self.prompt), self.sampling, self.choice, ())


def rows_with(cases: Sequence[Case], vocab_size: int) -> SamplingRows:
    state = SamplingRows(len(cases), vocab_size)
    for row, case in enumerate(cases):
        state.add(row, case.new_row(row), EOS)
    return state


def sample_all(logits: torch.Tensor, cases: Sequence[Case]) -> Sampled:
    state = rows_with(cases, logits.shape[1])
    return sample(logits.clone(), np.arange(len(cases)), np.array([case.position for case in cases]), state)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


# The slow sampler.


def edited(logits: NDArray[np.float32], case: Case) -> NDArray[np.float32]:
    params, x = case.sampling, logits.copy()
    for token_id, bias in params.logit_bias.items():
        x[token_id] += np.float32(bias)
    if params.allowed_token_ids:
        x = np.array([v if i in params.allowed_token_ids else -np.inf for i, v in enumerate(x)], np.float32)
    if len(case.output) < params.min_tokens:
        x[[*EOS, *params.stop_token_ids]] = -np.inf
    for i in range(len(x)):
        count = np.float32(case.output.count(i))
        if i in case.prompt or count:
            repetition = np.float32(params.repetition_penalty)
            x[i] = x[i] / repetition if x[i] > 0 else x[i] * repetition
        if count:
            x[i] -= np.float32(params.presence_penalty)
            x[i] -= np.float32(params.frequency_penalty) * count
    return x


def choose(x: NDArray[np.float32], params: SamplingParams, number: float, top_p: float, min_p: float) -> int:
    scaled = (x - x.max()).astype(np.float64) / np.float32(params.temperature)
    weights = np.exp(scaled)
    ranked = [i for i in np.lexsort((np.arange(len(x)), -scaled)).tolist() if weights[i] > 0]
    if params.top_k:
        ranked = ranked[: params.top_k]
    mass = sum(weights[i] for i in ranked)
    kept: list[int] = []
    for i in ranked:
        if sum(weights[j] for j in kept) < top_p * mass:
            kept.append(i)
    kept = [i for i in kept if weights[i] >= min_p * weights[ranked[0]]]
    kept.sort()
    running, target = 0.0, number * sum(weights[i] for i in kept)
    for i in kept:
        running += weights[i]
        if running > target:
            return i
    return kept[-1]


def acceptable(logits: NDArray[np.float32], case: Case) -> set[int]:
    """The slow sampler's token; several only where float32 may fall on either side of a border."""
    x = edited(logits, case)
    params = case.sampling
    if params.is_greedy:
        return {int(np.argmax(x))}
    seed = np.array([params.seed or 0], np.uint64)
    number = float(uniforms(seed, np.array([case.position]), np.array([case.choice]))[0])
    return {
        choose(x, params, min(max(number + du, 0.0), 1.0), max(params.top_p + dp, 1e-12), params.min_p * (1 + dm))
        for du in (-1e-5, 0.0, 1e-5)
        for dp in ((-1e-6, 0.0, 1e-6) if params.top_p < 1.0 else (0.0,))
        for dm in ((-1e-5, 0.0) if params.min_p else (0.0,))
    }


def assert_equals_the_slow_sampler(logits: torch.Tensor, cases: Sequence[Case]) -> None:
    sampled = sample_all(logits, cases)
    assert not sampled.is_bad.any()
    for row, case in enumerate(cases):
        assert int(sampled.token_ids[row]) in acceptable(logits[row].numpy(), case), case


# Each parameter, then all of them mixed.

DRAWN: dict[str, Any] = {"temperature": 0.9}
EACH_PARAMETER: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 1.0},
    {"temperature": 5.0},
    {"temperature": 1e-30},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 4000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 10, "top_p": 0.7, "min_p": 0.1},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.2},
    {"frequency_penalty": -2.0, "temperature": 0.0},
    {"logit_bias": {4: 6.0, 5: -100.0}},
    {"logit_bias": {4: 100.0}, "temperature": 0.0},
    {"allowed_token_ids": (7, 9, 11)},
    {"allowed_token_ids": (8,), "temperature": 0.0},
    {"min_tokens": 9, "stop_token_ids": (3, 4), "logit_bias": {2: 9.0, 3: 8.0}},
    {"min_tokens": 2, "logit_bias": {2: 9.0}},
    {"seed": 2**64 - 1},
]


@pytest.mark.parametrize("parameters", EACH_PARAMETER, ids=str)
def test_each_parameter_does_what_the_slow_sampler_does(parameters: dict[str, Any]) -> None:
    base = DRAWN | parameters
    cases = [
        Case(SamplingParams(**({"seed": seed} | base)), prompt=(1, 3, 3, 6), output=(5, 6, 5, 9), choice=seed % 3)
        for seed in range(40)
    ]
    assert_equals_the_slow_sampler(random_logits(40, 67), cases)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.5, 8.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.93]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.8, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.3, 0.9]),
    logit_bias=st.dictionaries(st.integers(0, 32), st.sampled_from([-100.0, -1.0, 2.5]), max_size=4),
    allowed_token_ids=st.sampled_from([(), (), (4, 8, 15, 16, 23)]),
    seed=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.sampled_from([(), (8, 15)]),
    logprobs=st.sampled_from([None, None, 0, 3]),
)
TOKENS = st.lists(st.integers(0, 32), max_size=8).map(tuple)
CASES = st.lists(st.builds(Case, PARAMS, TOKENS, TOKENS, st.integers(0, 3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=80)
@given(cases=CASES, seed=st.integers(0, 1000), has_ties=st.booleans())
def test_mixed_batches_do_what_the_slow_sampler_does(cases: list[Case], seed: int, has_ties: bool) -> None:
    logits = random_logits(len(cases), 33, seed)
    assert_equals_the_slow_sampler(logits.round() if has_ties else logits, cases)


# Filters.


def test_the_most_likely_token_wins_and_among_equals_the_smallest_id() -> None:
    logits = torch.zeros(3, 300)
    logits[1, [290, 70, 200]] = 5.0
    logits[2, 299] = 1.0
    for params in (
        GREEDY,
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(temperature=1e-6, top_k=1),
    ):
        assert sample_all(logits, [Case(params)] * 3).token_ids.tolist() == [0, 70, 299], params


@pytest.mark.parametrize("top_k", [1, 5, 70, 130, 600])
def test_top_k_keeps_exactly_k_even_among_equals(top_k: int) -> None:
    cases = [Case(SamplingParams(top_k=top_k, seed=seed)) for seed in range(1500)]
    token_ids = set(sample_all(torch.zeros(1, 1000).expand(1500, -1), cases).token_ids.tolist())
    assert max(token_ids) < top_k
    assert len(token_ids) > 0.6 * top_k


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_a_nucleus_of_thousands_is_the_smallest_set_that_reaches_top_p(scale: float) -> None:
    probabilities = torch.softmax(random_logits(3, 5003, scale=scale), dim=1)
    nucleus = keep_nucleus(probabilities, torch.tensor([0.5, 0.9, 0.999], dtype=torch.float64))
    for row, top_p in enumerate((0.5, 0.9, 0.999)):
        values = probabilities[row].double().numpy()
        order = np.lexsort((np.arange(5003), -values))
        cumulative = values[order].cumsum()
        kept = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        found = np.flatnonzero(nucleus[row].numpy())
        assert abs(len(found) - kept) <= 1
        assert set(found) == set(order[: len(found)].tolist())
        assert torch.equal(nucleus[row][found], probabilities[row][found])


def test_a_wide_nucleus_is_drawn_from_by_its_probabilities() -> None:
    logits = random_logits(1, 2000, scale=0.5)
    params = SamplingParams(top_p=0.8)
    cases = [Case(dataclasses.replace(params, seed=seed)) for seed in range(4000)]
    token_ids = sample_all(logits.expand(4000, -1), cases).token_ids
    nucleus = keep_nucleus(torch.softmax(logits, dim=1), torch.tensor([0.8], dtype=torch.float64))[0]
    assert (nucleus[token_ids] > 0).all()
    # In ten groups of equal probability.
    edges = (nucleus.double().cumsum(0) / nucleus.double().sum() * 9.999999).long()
    assert chi_square(torch.bincount(edges[token_ids], minlength=10), torch.bincount(edges, nucleus.double())) < 40


def test_running_totals_are_found_at_any_width() -> None:
    for width in (1, 2, 3, 5, 64, 65, 1023):
        weights = torch.rand(4, width, generator=torch.Generator().manual_seed(width))
        weights[:, ::3] = 0.0
        weights[:, -1] = 1.0
        cumulative = weights.double().cumsum(1)
        for fraction in (1e-12, 0.31, 0.77, 1.0 - 1e-12):
            found = first_exceeding(weights, torch.full((4,), fraction, dtype=torch.float64))
            expected = (cumulative <= fraction * cumulative[:, -1:]).sum(1).clamp(max=width - 1)
            assert torch.equal(found, expected), (width, fraction)
    assert first_exceeding(torch.zeros(2, 7), torch.full((2,), 0.5, dtype=torch.float64)).tolist() == [0, 0]


# The draw.


def chi_square(observed: torch.Tensor, weights: torch.Tensor) -> float:
    expected = weights.double() / weights.sum() * observed.sum()
    used = expected > 0
    assert not observed[~used].any()
    return float(((observed - expected)[used] ** 2 / expected[used]).sum())


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.85}, {"min_p": 0.1}, {"top_k": 15, "top_p": 0.9}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(parameters: dict[str, Any]) -> None:
    params = SamplingParams(**parameters)
    logits = random_logits(1, 20, seed=3, scale=1.0)
    weights = np.exp(logits[0].double().numpy() / params.temperature)
    ranked = np.argsort(-weights)[: params.top_k or 20]
    cumulative = weights[ranked].cumsum()
    ranked = ranked[np.append(0.0, cumulative[:-1]) < params.top_p * cumulative[-1]]
    ranked = ranked[weights[ranked] >= params.min_p * weights[ranked[0]]]
    expected = torch.zeros(20, dtype=torch.float64)
    expected[ranked] = torch.from_numpy(weights[ranked])
    num_rows, num_positions = 500, 40
    state = rows_with([Case(dataclasses.replace(params, seed=seed)) for seed in range(num_rows)], 20)
    observed = torch.zeros(20, dtype=torch.int64)
    for position in range(num_positions):
        sampled = sample(logits.repeat(num_rows, 1), np.arange(num_rows), np.full(num_rows, position), state)
        observed += torch.bincount(sampled.token_ids, minlength=20)
    assert chi_square(observed, expected) < 60  # at most 19 degrees of freedom


def test_seed_choice_and_position_make_the_draw_and_nothing_else() -> None:
    logits = random_logits(1, 500, scale=0.1)

    def token_id(seed: int | None, choice: int, prompt: tuple[int, ...]) -> int:
        return int(sample_all(logits, [Case(SamplingParams(seed=seed), prompt, choice=choice)]).token_ids[0])

    assert token_id(7, 1, (5, 6)) == token_id(7, 1, (8, 9)) == token_id(7, 1, (8, 9))
    assert token_id(None, 0, (1,)) == token_id(0, 0, (1,))
    assert len({token_id(7, 0, (1,)), token_id(8, 0, (1,)), token_id(7, 1, (1,)), token_id(7, 0, (1, 1))}) == 4


# Rows side by side.

MIX = [
    SamplingParams(seed=1),
    GREEDY,
    SamplingParams(top_p=0.9, seed=2),
    SamplingParams(top_p=0.999, temperature=3.0, seed=3),
    SamplingParams(top_k=40, top_p=0.8, seed=4),
    SamplingParams(top_k=500, seed=5, logprobs=5),
    SamplingParams(min_p=0.01, seed=6, logprobs=0),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=20),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, seed=7),
    SamplingParams(logit_bias={4: 5.0, 9: -3.0}, seed=8),
    SamplingParams(allowed_token_ids=tuple(range(0, 900, 7)), top_p=0.95, seed=9),
    SamplingParams(min_tokens=50, stop_token_ids=(0, 1), seed=10),
]


def values_of(sampled: Sampled) -> list[tuple[int, tuple[TokenLogprob, ...]]]:
    token_ids = sampled.token_ids.tolist()
    logprobs = [()] * len(token_ids) if sampled.logprobs is None else sampled.logprobs.token_logprobs(len(token_ids))
    return list(zip(token_ids, logprobs, strict=True))


@pytest.mark.parametrize(("vocab_size", "is_rounded"), [(4096, False), (1003, False), (4096, True)])
def test_companions_do_not_change_a_bit_of_a_row(vocab_size: int, is_rounded: bool) -> None:
    cases = [Case(MIX[i % len(MIX)], prompt=tuple(range(i, i + 9)), output=(4, 4, i)) for i in range(17)]
    logits = random_logits(17, vocab_size)
    if is_rounded:
        logits = logits.bfloat16().float()
    together = values_of(sample_all(logits, cases))
    alone = [values_of(sample_all(logits[i : i + 1], cases[i : i + 1]))[0] for i in range(17)]
    assert together == alone
    order = np.random.default_rng(0).permutation(17).tolist()
    shuffled = values_of(sample_all(logits[order], [cases[i] for i in order]))
    assert shuffled == [together[i] for i in order]
    for part in (slice(0, 2), slice(3, 8)):
        assert values_of(sample_all(logits[part], cases[part])) == together[part]


@pytest.mark.parametrize("column", [0, 63, 64, 998, 1002])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_flagged_and_the_others_go_on(column: int, value: float) -> None:
    cases = [Case(params) for params in MIX]
    logits = random_logits(len(MIX), 1003)
    clean = values_of(sample_all(logits, cases))
    for bad_row in range(len(MIX)):
        broken = logits.clone()
        broken[bad_row, column] = value
        sampled = sample_all(broken, cases)
        assert sampled.is_bad.tolist() == [row == bad_row for row in range(len(MIX))]
        assert 0 <= int(sampled.token_ids[bad_row]) < 1003
        values = values_of(sampled)
        assert values[:bad_row] + values[bad_row + 1 :] == clean[:bad_row] + clean[bad_row + 1 :]


def test_rows_without_any_finite_logit_are_flagged() -> None:
    for fill in (math.nan, math.inf, -math.inf):
        sampled = sample_all(torch.full((len(MIX), 1003), fill), [Case(params) for params in MIX])
        assert sampled.is_bad.all()
        values_of(sampled)


@pytest.mark.parametrize(
    "parameters", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str
)
def test_a_row_whose_every_token_is_forbidden_is_flagged(parameters: dict[str, Any]) -> None:
    forbidden = SamplingParams(allowed_token_ids=(2, 5), stop_token_ids=(5,), min_tokens=1, **parameters)
    sampled = sample_all(random_logits(3, 100), [Case(GREEDY), Case(forbidden), Case(SamplingParams())])
    assert sampled.is_bad.tolist() == [False, True, False]


def test_few_allowed_tokens_survive_every_filter() -> None:
    params = SamplingParams(allowed_token_ids=(50, 60), top_k=40, top_p=0.999, min_p=0.0001)
    logits = torch.zeros(200, 100)
    cases = [Case(dataclasses.replace(params, seed=seed)) for seed in range(200)]
    assert set(sample_all(logits, cases).token_ids.tolist()) == {50, 60}


def test_logits_of_a_smaller_type_are_left_as_they_are() -> None:
    logits = random_logits(2, 300).bfloat16()
    before = logits.clone()
    state = rows_with([Case(SamplingParams(seed=1)), Case(GREEDY)], 300)
    sampled = sample(logits, np.arange(2), np.array([2, 2]), state)
    assert torch.equal(logits, before)
    assert torch.equal(
        sampled.token_ids, sample_all(logits.float(), [Case(SamplingParams(seed=1)), Case(GREEDY)]).token_ids
    )


def test_a_step_that_samples_nothing_is_fine() -> None:
    state = rows_with([Case(GREEDY)], 10)
    sampled = sample(torch.zeros(0, 10), np.arange(0), np.arange(0), state)
    assert sampled.token_ids.shape == sampled.is_bad.shape == (0,)


# Rows from step to step.


def test_appended_tokens_count_like_tokens_that_a_row_started_with() -> None:
    params = [
        SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.4, temperature=0.0),
        GREEDY,
        SamplingParams(frequency_penalty=1.0, seed=3, min_tokens=4),
    ]
    logits = random_logits(3, 40)
    tokens = [(7, 8, 9), (7, 7, 7), (2, 7, 8), (9, 9, 9), (7, 2, 9)]
    state = rows_with([Case(p) for p in params], 40)
    rows = np.arange(3)
    for num_output in range(len(tokens)):
        outputs = list(zip(*tokens[:num_output], strict=True)) or [()] * 3
        cases = [Case(p, output=output) for p, output in zip(params, outputs, strict=True)]
        positions = np.full(3, 2 + num_output)
        assert values_of(sample(logits.clone(), rows, positions, state)) == values_of(sample_all(logits, cases))
        state.append(rows, torch.tensor(tokens[num_output]))


def test_some_rows_of_many_are_sampled_and_appended() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    state = rows_with([Case(params)] * 5, 30)
    logits = torch.zeros(2, 30)
    logits[:, 11] = 1.0
    rows = np.array([4, 1])
    assert sample(logits.clone(), rows, np.array([2, 2]), state).token_ids.tolist() == [11, 11]
    state.append(np.array([4]), np.array([11]))
    assert sample(logits.clone(), rows, np.array([3, 2]), state).token_ids.tolist() == [0, 11]


def test_a_row_that_is_taken_again_remembers_nothing() -> None:
    everything = SamplingParams(
        temperature=0.0,
        repetition_penalty=5.0,
        logit_bias={3: 50.0},
        allowed_token_ids=(3, 4),
        min_tokens=5,
        stop_token_ids=(4,),
        logprobs=2,
    )
    state = rows_with([Case(everything, prompt=(20, 21))], 30)
    state.append(np.array([0]), np.array([22]))
    state.remove(0)
    assert not state.edits(np.array([0]))
    logits = torch.zeros(1, 30)
    logits[0, [20, 22]] = torch.tensor([3.0, 2.0])
    penalised = SamplingParams(temperature=0.0, presence_penalty=2.0)
    for params, prompt, expected in ((GREEDY, (20,), 20), (penalised, (22,), 20)):
        state.add(0, Case(params, prompt=prompt).new_row(0), EOS)
        sampled = sample(logits.clone(), np.array([0]), np.array([1]), state)
        assert sampled.token_ids.tolist() == [expected]
        assert sampled.logprobs is None


def test_endings_are_forbidden_until_min_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(6,))
    state = rows_with([Case(params)], 30)
    logits = torch.zeros(1, 30)
    logits[0, [2, 6, 9]] = torch.tensor([3.0, 2.0, 1.0])
    for expected in (9, 9, 2):
        sampled = sample(logits.clone(), np.array([0]), np.array([2]), state)
        assert sampled.token_ids.tolist() == [expected]
        state.append(np.array([0]), sampled.token_ids)


@pytest.mark.parametrize(
    "parameters", [{"logit_bias": {30: 1.0}}, {"allowed_token_ids": (1, 30)}, {"stop_token_ids": (99,)}], ids=str
)
def test_token_ids_outside_the_vocabulary_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="outside the vocabulary of 30"):
        rows_with([Case(SamplingParams(**parameters))], 30)


# Log-probabilities.


def assert_logprob_is(value: TokenLogprob, logits: torch.Tensor, token_id: int, num_top: int) -> None:
    expected = logits.double() - logits.double().logsumexp(0)
    assert value.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
    ranked = np.lexsort((np.arange(len(logits)), -logits.numpy()))[:num_top]
    assert value.top_token_ids == tuple(ranked.tolist())
    assert value.top_logprobs == pytest.approx(expected[ranked].tolist(), abs=1e-5)


def test_logprobs_are_those_of_the_raw_logits_for_the_rows_that_want_them() -> None:
    logits = random_logits(len(MIX), 1003).bfloat16().float()  # with many equal values
    sampled = sample_all(logits, [Case(params) for params in MIX])
    for row, (params, (token_id, logprobs)) in enumerate(zip(MIX, values_of(sampled), strict=True)):
        assert len(logprobs) == (params.logprobs is not None)
        for value in logprobs:
            assert_logprob_is(value, logits[row], token_id, params.logprobs or 0)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    sampled = sample_all(random_logits(1, 7), [Case(SamplingParams(logprobs=20))])
    assert sorted(values_of(sampled)[0][1][0].top_token_ids) == list(range(7))


@pytest.mark.parametrize("num_top", [0, 4])
def test_prompt_logprobs_are_those_of_the_next_tokens(num_top: int) -> None:
    logits = random_logits(150, 300)
    next_token_ids = torch.arange(150) * 2 % 300
    values = prompt_logprobs(logits, next_token_ids, num_top)
    assert len(values) == 150
    for row, value in enumerate(values):
        assert_logprob_is(value, logits[row], int(next_token_ids[row]), num_top)
    assert prompt_logprobs(logits[:0], next_token_ids[:0], num_top) == []
