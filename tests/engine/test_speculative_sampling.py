"""Sampling with drafts against sampling without: the same tokens, and how many drafts are right."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, ScheduledRow, TokenLogprob
from rempart_engine.places import Places, sampling_places
from rempart_engine.sampler import Sampled, Verified, draft, sample, verify
from rempart_engine.sampling_rows import SamplingRows

GREEDY = SamplingParams(temperature=0.0)
MIX = [
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.6, top_p=0.95),
    SamplingParams(seed=3, top_k=20, logprobs=3),
    SamplingParams(seed=4, min_p=0.05, temperature=1.4),
    SamplingParams(seed=5, top_k=50, top_p=0.8, min_p=0.01),
    SamplingParams(seed=6, logit_bias={3: 2.0, 7: -5.0}, logprobs=0),
    SamplingParams(seed=7, allowed_token_ids=tuple(range(0, 90, 3)), top_p=0.9),
    SamplingParams(temperature=0.0, logit_bias={11: 4.0}, logprobs=2),
]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_with(params: Sequence[SamplingParams], vocab_size: int, choice: int = 0) -> SamplingRows:
    state = SamplingRows(len(params), vocab_size)
    for row, sampling in enumerate(params):
        state.add(row, NewRow(row, (0, 0), 2, sampling, choice, ()), ())
    return state


def places_of(num_drafts: Sequence[int], starts: Sequence[int]) -> Places:
    """Rows 0, 1, ... whose last tokens stand at `starts`, each followed by so many drafts."""
    return sampling_places(
        [
            ScheduledRow(row, start, 1 + count, (), samples=True, num_draft_tokens=count)
            for row, (count, start) in enumerate(zip(num_drafts, starts, strict=True))
        ]
    )


def logprobs_of(sampled: Sampled) -> list[tuple[TokenLogprob, ...]]:
    num_places = len(sampled.token_ids)
    return [()] * num_places if sampled.logprobs is None else sampled.logprobs.token_logprobs(num_places)


@dataclasses.dataclass(frozen=True)
class TwoTokenModel:
    """Logits that depend on the last two tokens, and a draft model's that are like them."""

    vocab_size: int = 90
    scale: float = 2.0
    noise: float = 0.5

    def target(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor:  # [R, V]
        last, before = (torch.tensor([context[-back] for context in contexts]) for back in (1, 2))
        table, other = (random_tensor(self.vocab_size, self.vocab_size, seed=seed) for seed in (1, 2))
        return self.scale * (table[last] + other[before])

    def draft(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor:  # [R, V]
        last = torch.tensor([context[-1] for context in contexts])
        return self.target(contexts) + self.noise * random_tensor(self.vocab_size, self.vocab_size, seed=3)[last]


@dataclasses.dataclass(frozen=True)
class Run:
    """What all rows said."""

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    num_drafts: int = 0
    num_accepted: int = 0


def run_without_drafts(model: TwoTokenModel, params: Sequence[SamplingParams], num_tokens: int) -> Run:
    state = rows_with(params, model.vocab_size)
    contexts = [[0, 0] for _ in params]
    logprobs: list[list[TokenLogprob]] = [[] for _ in params]
    rows = np.arange(len(params))
    for position in range(2, 2 + num_tokens):
        sampled = sample(model.target(contexts), rows, np.full(len(params), position), state)
        assert not sampled.is_bad.any()
        for row, token_id in enumerate(sampled.token_ids.tolist()):
            contexts[row].append(token_id)
            logprobs[row] += logprobs_of(sampled)[row]
        state.append(rows, sampled.token_ids)
    return Run([context[2:] for context in contexts], logprobs)


def run_with_drafts(
    model: TwoTokenModel, params: Sequence[SamplingParams], num_tokens: int, most_drafts: int, seed: int = 0
) -> Run:
    """Rows with different numbers of drafts side by side, until each has its tokens."""
    state = rows_with(params, model.vocab_size)
    random = np.random.default_rng(seed)
    contexts = [[0, 0] for _ in params]
    logprobs: list[list[TokenLogprob]] = [[] for _ in params]
    num_drafts = num_accepted = 0
    while min(map(len, contexts)) < 2 + num_tokens:
        drafts = [
            _drafted(model, context, row, int(random.integers(most_drafts + 1)), state)
            for row, context in enumerate(contexts)
        ]
        places = places_of([len(some) for some in drafts], [len(context) - 1 for context in contexts])
        expected = torch.tensor([token_id for some in drafts for token_id in (*some, -1)])
        reached = [
            [*context, *some[:number]]
            for context, some in zip(contexts, drafts, strict=True)
            for number in range(len(some) + 1)
        ]
        verified = verify(model.target(reached), places, expected, state)
        assert not verified.is_bad.any()
        kept = verified.is_kept.numpy()
        found = logprobs_of(verified.sampled)
        for place in np.flatnonzero(kept).tolist():
            row = int(places.rows[place])
            contexts[row].append(int(verified.sampled.token_ids[place]))
            logprobs[row] += found[place]
        state.append(places.rows[kept], verified.sampled.token_ids[verified.is_kept])
        num_drafts += sum(map(len, drafts))
        num_accepted += int(kept.sum()) - len(params)
    lengths = slice(2, 2 + num_tokens)
    return Run(
        [context[lengths] for context in contexts],
        [values[:num_tokens] for values in logprobs],
        num_drafts,
        num_accepted,
    )


def _drafted(model: TwoTokenModel, context: list[int], row: int, count: int, state: SamplingRows) -> list[int]:
    drafts: list[int] = []
    for position in range(len(context), len(context) + count):
        logits = model.draft([[*context, *drafts]])
        drafts.append(int(draft(logits, np.array([row]), np.array([position]), state)[0]))
    return drafts


# The same tokens.


@pytest.mark.parametrize("noise", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("most_drafts", [1, 2, 3])
def test_drafts_change_neither_a_token_nor_a_bit_of_its_logprobs(most_drafts: int, noise: float) -> None:
    model = TwoTokenModel(noise=noise)
    plain = run_without_drafts(model, MIX, 40)
    drafted = run_with_drafts(model, MIX, 40, most_drafts)
    assert drafted.token_ids == plain.token_ids
    assert drafted.logprobs == plain.logprobs
    assert len({tuple(tokens) for tokens in plain.token_ids}) == len(MIX)
    if noise == 0.0:
        assert drafted.num_accepted == drafted.num_drafts
    else:
        assert 0 < drafted.num_accepted < drafted.num_drafts


def test_greedy_ids_of_64_rows_are_the_same() -> None:
    model = TwoTokenModel(noise=1.0)
    params = [dataclasses.replace(GREEDY, logit_bias={row: 1.0}) for row in range(64)]
    assert run_with_drafts(model, params, 30, 3).token_ids == run_without_drafts(model, params, 30).token_ids


# What is kept.


def kept_by_hand(places: Places, token_ids: Sequence[int], drafts: Sequence[int], bad: Sequence[bool]) -> list[bool]:
    kept = [False] * len(token_ids)
    goes_on = False
    for place in range(len(token_ids)):
        goes_on = goes_on or bool(places.is_first[place])
        kept[place] = goes_on and not bad[place]
        goes_on = kept[place] and not places.is_last[place] and token_ids[place] == drafts[place]
    return kept


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num_drafts=st.lists(st.integers(0, 3), max_size=6))
def test_a_row_keeps_its_tokens_up_to_the_first_that_differs_from_its_draft(
    data: st.DataObject, num_drafts: list[int]
) -> None:
    places = places_of(num_drafts, range(5, 5 + len(num_drafts)))
    num_places = len(places.rows)
    in_vocabulary = st.lists(st.integers(0, 2), min_size=num_places, max_size=num_places)
    token_ids, drafts = data.draw(in_vocabulary), data.draw(in_vocabulary)
    bad = data.draw(st.lists(st.sampled_from([False, False, True]), min_size=num_places, max_size=num_places))
    logits = torch.nn.functional.one_hot(torch.tensor(token_ids, dtype=torch.int64), 3).float()
    logits[torch.tensor(bad, dtype=torch.bool)] = torch.nan
    state = rows_with([GREEDY] * max(1, len(num_drafts)), 3)
    verified = verify(logits, places, torch.tensor(drafts, dtype=torch.int64), state)
    assert verified.is_kept.tolist() == kept_by_hand(places, token_ids, drafts, bad)
    assert verified.is_bad.tolist() == [bad[place] for place in np.flatnonzero(places.is_first)]


def test_places_follow_the_plan() -> None:
    plan_rows = [
        ScheduledRow(4, 10, 3, (), samples=True, num_draft_tokens=2),
        ScheduledRow(1, 0, 6, (), samples=False),
        ScheduledRow(0, 0, 7, (), samples=True),
        ScheduledRow(2, 8, 2, (), samples=True, num_draft_tokens=1),
    ]
    places = sampling_places(plan_rows)
    assert places.rows.tolist() == [4, 4, 4, 0, 2, 2]
    assert places.row_numbers.tolist() == [0, 0, 0, 1, 2, 2]
    assert places.positions.tolist() == [11, 12, 13, 7, 9, 10]
    assert places.is_first.tolist() == [True, False, False, True, True, False]
    assert places.is_last.tolist() == [False, False, True, True, False, True]
    assert places.has_drafts
    assert not sampling_places(plan_rows[1:3]).has_drafts
    assert len(sampling_places(plan_rows[1:2]).rows) == 0


def outcome(verified: Verified) -> list[tuple[int, bool, tuple[TokenLogprob, ...]]]:
    sampled = verified.sampled
    return list(zip(sampled.token_ids.tolist(), verified.is_kept.tolist(), logprobs_of(sampled), strict=True))


def test_companions_do_not_change_a_bit_of_what_a_row_keeps() -> None:
    num_drafts = [row % 4 for row in range(len(MIX))]
    starts = [3 * row + 1 for row in range(len(MIX))]
    places = places_of(num_drafts, starts)
    logits = random_tensor(len(places.rows), 1003)
    state = rows_with(MIX, 1003)
    right = sample(logits.clone(), places.rows, places.positions, state).token_ids
    drafts = torch.where(torch.arange(len(right)) % 3 == 1, right + 1, right)
    together = outcome(verify(logits.clone(), places, drafts, state))
    assert any(kept for _, kept, _ in together[1::2])
    for row in range(len(MIX)):
        mine = np.flatnonzero(places.rows == row)
        scheduled = ScheduledRow(row, starts[row], 1 + num_drafts[row], (), True, num_draft_tokens=num_drafts[row])
        alone = outcome(verify(logits[mine], sampling_places([scheduled]), drafts[mine], state))
        assert alone == [together[place] for place in mine.tolist()]


def test_rows_that_must_be_sampled_one_token_at_a_time_say_so() -> None:
    params = [
        *(GREEDY, SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=(1, 2))),
        *(SamplingParams(presence_penalty=1.0), SamplingParams(min_tokens=1, stop_token_ids=(4,))),
    ]
    state = rows_with(params, 10)
    assert [state.may_repeat(np.array([row])) for row in range(4)] == [True, True, False, False]
    state.append(np.array([3]), np.array([5]))
    assert state.may_repeat(np.array([3]))
    assert not state.may_repeat(np.arange(4))


def test_tokens_of_a_row_that_comes_twice_are_both_counted() -> None:
    state = rows_with([SamplingParams(min_tokens=2, stop_token_ids=(4,))] * 2, 10)
    state.append(np.array([0, 1, 0]), np.array([5, 5, 5]))
    assert [state.may_repeat(np.array([row])) for row in range(2)] == [True, False]


def test_a_guess_from_broken_logits_is_some_token() -> None:
    for fill in (torch.nan, torch.inf, -torch.inf):
        guesses = draft(torch.full((len(MIX), 90), fill), np.arange(len(MIX)), np.arange(len(MIX)), rows_with(MIX, 90))
        assert ((guesses >= 0) & (guesses < 90)).all()


# The same distribution.

NUM_PAIRS = 100_000
PAIRS_VOCABULARY = 5
CHI_SQUARE_LIMIT = 63.6
"""A chi-square variable with 24 degrees of freedom exceeds it once in 50,000 times."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The first two tokens of many sequences: both from one step if the draft was right, else from two."""

    first: torch.Tensor  # [N]
    second: torch.Tensor  # [N]
    expected: torch.Tensor  # [V, V], probabilities
    drafts: torch.Tensor  # [N]
    after_drafts: torch.Tensor  # [N], sampled as if every draft were right
    num_accepted: int


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities by definition, float64 like logits [R, V]."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=1)
    if params.top_k:
        least = probabilities.topk(params.top_k, dim=1).values[:, -1:]
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    return probabilities / probabilities.sum(dim=1, keepdim=True)


def draw_pairs(params: SamplingParams, noise: float) -> Pairs:
    """Each sequence is a draw of its own: 1,000 seeds at 100 positions."""
    v = PAIRS_VOCABULARY
    first_logits, second_logits = random_tensor(1, v, seed=5), random_tensor(v, v, seed=6)
    state = rows_with([dataclasses.replace(params, seed=seed) for seed in range(1000)], v)
    rows, starts = np.arange(NUM_PAIRS) % 1000, 8 + 3 * (np.arange(NUM_PAIRS) // 1000)
    draft_logits = first_logits + noise * random_tensor(1, v, seed=7)
    drafts = draft(draft_logits.repeat(NUM_PAIRS, 1), rows, starts + 1, state)
    places = sampling_places(
        [
            ScheduledRow(row, start, 2, (), samples=True, num_draft_tokens=1)
            for row, start in zip(rows.tolist(), starts.tolist(), strict=True)
        ]
    )
    logits = torch.stack((first_logits.expand(NUM_PAIRS, -1), second_logits[drafts]), dim=1).reshape(-1, v)
    verified = verify(logits, places, drafts.repeat_interleave(2), state)
    token_ids, is_kept = verified.sampled.token_ids.reshape(-1, 2), verified.is_kept.reshape(-1, 2)
    first = token_ids[:, 0]
    later = sample(second_logits[first], rows, starts + 2, state).token_ids
    return Pairs(
        first=first,
        second=torch.where(is_kept[:, 1], token_ids[:, 1], later),
        expected=filtered(first_logits, params).T * filtered(second_logits, params),
        drafts=drafts,
        after_drafts=token_ids[:, 1],
        num_accepted=int(is_kept[:, 1].sum()),
    )


def pair_chi_square(first: torch.Tensor, second: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(first * len(expected) + second, minlength=expected.numel()).reshape(expected.shape)
    means = expected * len(first)
    possible = means > 0
    assert not counts[~possible].any()
    return float(((counts - means)[possible] ** 2 / means[possible]).sum())


@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.7}, {"top_k": 4}], ids=str)
def test_sampled_tokens_have_the_models_distribution(parameters: dict[str, Any], noise: float) -> None:
    """Chi-square over the 25 pairs of two tokens in a row, 100,000 of them, at a level of 1 in 50,000.

    Power: pairs whose distribution is at total variation d from the right one give a noncentrality of at least 4 N d²
    (by Cauchy and Schwarz). So d = 0.015 is found with probability 0.997, d = 0.02 with more than 0.9999.
    """
    pairs = draw_pairs(SamplingParams(**parameters), noise)
    assert 0 < pairs.num_accepted < NUM_PAIRS
    assert pair_chi_square(pairs.first, pairs.second, pairs.expected) < CHI_SQUARE_LIMIT


def test_a_sampler_that_took_every_draft_would_be_found_out() -> None:
    pairs = draw_pairs(SamplingParams(), noise=0.05)
    wrong = torch.bincount(pairs.drafts, minlength=PAIRS_VOCABULARY) / NUM_PAIRS - pairs.expected.sum(dim=1)
    assert wrong.abs().sum() / 2 < 0.03
    assert pair_chi_square(pairs.drafts, pairs.after_drafts, pairs.expected) > CHI_SQUARE_LIMIT


# How many drafts are right.


def shared_number_overlap(target: NDArray[np.float64], drafting: NDArray[np.float64]) -> float:
    """The measure of those random numbers that give both distributions [V] the same token, by inverse CDF."""
    target_ends, drafting_ends = target.cumsum(), drafting.cumsum()
    starts = np.maximum(target_ends - target, drafting_ends - drafting)
    return float(np.maximum(0.0, np.minimum(target_ends, drafting_ends) - starts).sum())


@pytest.mark.parametrize("parameters", [{}, {"top_k": 40}], ids=str)
@pytest.mark.parametrize(("scale", "least_of_best"), [(10.0, 0.95), (5.0, 0.8), (1.0, 0.4)])
def test_as_many_drafts_are_right_as_the_shared_random_number_allows(
    parameters: dict[str, Any], scale: float, least_of_best: float
) -> None:
    """No coupling accepts more than the overlap of the distributions; a peaked one loses little of that."""
    params, v, num_draws = SamplingParams(**parameters), 500, 4000
    target = scale * random_tensor(1, v, seed=1)
    drafting = target + 0.2 * random_tensor(1, v, seed=2)
    state = rows_with([params], v)
    rows, positions = np.zeros(num_draws, np.int64), np.arange(num_draws)
    sampled = sample(target.repeat(num_draws, 1), rows, positions, state).token_ids
    guesses = draft(drafting.repeat(num_draws, 1), rows, positions, state)
    accepted = float((sampled == guesses).double().mean())
    p, q = filtered(target, params)[0].numpy(), filtered(drafting, params)[0].numpy()
    assert accepted == pytest.approx(shared_number_overlap(p, q), abs=0.035)  # more than 4 standard deviations
    best = float(np.minimum(p, q).sum())
    assert least_of_best * best < accepted < best + 0.035
