"""Sampling on a GPU against the sampler of the CPU: the same parameters, rows and positions mean the same tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rempart_engine.core.request import InvalidRequestError, SamplingParams
from rempart_engine.core.step import NewRow, TokenLogprob
from rempart_engine.device_sampling import DeviceSampled, DeviceSampling
from rempart_engine.kernels.sample.testing import is_choice
from rempart_engine.sampler import draft, sample
from rempart_engine.sampling_rows import SamplingRows

EOS = (2,)
GREEDY = SamplingParams(temperature=0.0)
VOCAB = 300


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

    def add_to(self, state: SamplingRows | DeviceSampling, row: int) -> None:
        state.add(row, NewRow(row, self.prompt + self.output, len(self.prompt), self.sampling, self.choice, ()), EOS)


class Both:
    """Rows of both samplers."""

    def __init__(self, cases: Sequence[Case], device: torch.device, vocab_size: int = VOCAB) -> None:
        self.cpu = SamplingRows(len(cases), vocab_size)
        self.gpu = DeviceSampling(len(cases), vocab_size, device)
        self.device = device
        self.positions = np.array([case.position for case in cases])
        for row, case in enumerate(cases):
            case.add_to(self.cpu, row)
            case.add_to(self.gpu, row)

    def sample(self, logits: torch.Tensor) -> DeviceSampled:
        """The GPU's outcome, once it is known to be right."""
        rows = np.arange(len(logits))
        expected = sample(logits.clone(), rows, self.positions, self.cpu)
        found = self.gpu.sample(logits.clone().to(self.device), rows, self.positions)
        assert torch.equal(found.is_bad.cpu(), expected.is_bad)
        self.assert_tokens(found.token_ids, expected.token_ids, logits, ~expected.is_bad)
        assert (found.logprobs is None) == (expected.logprobs is None)
        if found.logprobs is not None and expected.logprobs is not None:
            values = zip(
                *(some.token_logprobs(len(logits)) for some in (found.logprobs, expected.logprobs)), strict=True
            )
            for row, (some, others) in enumerate(values):
                if not expected.is_bad[row] and found.token_ids[row] == expected.token_ids[row]:
                    assert_like(some, others)
        return found

    def append(self, token_ids: torch.Tensor) -> None:
        rows = np.arange(len(token_ids))
        self.cpu.append(rows, token_ids.cpu())
        self.gpu.append(rows, token_ids)
        self.positions += 1

    def assert_tokens(
        self, found: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, is_good: torch.Tensor
    ) -> None:
        """Equal, but where float32 may fall on either side of a border."""
        rows = np.arange(len(logits))
        edited = logits.clone()
        self.cpu.edit(edited, rows)
        draws = self.cpu.draws(rows, self.positions)
        for row in torch.nonzero((found.cpu() != expected) & is_good)[:, 0].tolist():
            assert is_choice(int(found[row]), edited[row], draws, row), (row, int(found[row]), int(expected[row]))


def assert_like(found: Sequence[TokenLogprob], expected: Sequence[TokenLogprob]) -> None:
    assert len(found) == len(expected)
    for some, other in zip(found, expected, strict=True):
        assert some.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert some.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)
        assert some.top_token_ids == other.top_token_ids


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


MIX = [
    SamplingParams(seed=1),
    SamplingParams(top_p=0.9, seed=2),
    SamplingParams(top_k=40, top_p=0.8, seed=4, logprobs=0),
    SamplingParams(min_p=0.01, seed=6, logprobs=5),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=20),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, seed=7),
    SamplingParams(logit_bias={4: 5.0, 9: -3.0}, seed=8, logprobs=2),
    SamplingParams(allowed_token_ids=tuple(range(0, 300, 7)), top_p=0.95, seed=9),
    SamplingParams(min_tokens=2, stop_token_ids=(0, 1), logit_bias={2: 20.0}, seed=10),
    GREEDY,
]


def test_steps_of_mixed_rows_sample_what_the_cpu_does(device: torch.device) -> None:
    """Penalties and min_tokens change from step to step, and some rows start with output."""
    both = Both([Case(params, (1, 3, 3, 6), (5, 6, 5)[: row % 2]) for row, params in enumerate(MIX)], device)
    for step in range(4):
        logits = random_logits(len(MIX), step).bfloat16().float()  # with many equal values
        both.append(both.sample(logits).token_ids)


EACH_PARAMETER: list[dict[str, Any]] = [
    {"temperature": 1e-30},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": -2.0, "temperature": 0.0},
    {"logit_bias": {4: 100.0}, "temperature": 0.0},
    {"allowed_token_ids": (8,), "temperature": 0.0},
    {"allowed_token_ids": (7, 9, 11), "logit_bias": {7: -100.0}},
    {"min_tokens": 9, "stop_token_ids": (3, 4), "logit_bias": {2: 19.0, 3: 18.0}},
    {"min_tokens": 2, "logit_bias": {2: 19.0}},
    {"top_k": 1000, "seed": 2**64 - 1},
]


def test_each_parameter_does_what_it_does_on_the_cpu(device: torch.device) -> None:
    cases = [
        Case(SamplingParams(**({"seed": seed} | parameters)), (1, 3, 3, 6), (5, 6, 5, 9), choice=seed)
        for parameters in EACH_PARAMETER
        for seed in range(3)
    ]
    Both(cases, device).sample(random_logits(len(cases)))


def test_rows_of_which_no_token_can_be_chosen_are_bad(device: torch.device) -> None:
    allowed = SamplingParams(allowed_token_ids=(5, 6), logprobs=3)
    cases = [Case(params) for params in (GREEDY, allowed, allowed, allowed, SamplingParams(logprobs=1), GREEDY)]
    both = Both(cases, device)
    logits = random_logits(6)
    logits[0, 7] = torch.nan
    logits[1, 100] = torch.inf  # though it is not allowed
    logits[2, [5, 6]] = -torch.inf
    logits[4] = -torch.inf
    found = both.sample(logits)
    assert found.is_bad.tolist() == [True, True, True, False, True, False]
    assert ((found.token_ids >= 0) & (found.token_ids < VOCAB)).all()


def test_a_row_may_be_sampled_at_several_positions(device: torch.device) -> None:
    cases = [Case(SamplingParams(logit_bias={4: 3.0}, seed=5)), Case(SamplingParams(top_p=0.8, logprobs=1))]
    both = Both(cases, device)
    assert both.gpu.may_repeat(np.array([0, 1]))
    rows, positions = np.array([0, 0, 0, 1, 1]), np.array([2, 3, 4, 2, 3])
    logits = random_logits(5)
    found = both.gpu.sample(logits.clone().to(device), rows, positions)
    expected = sample(logits.clone(), rows, positions, both.cpu)
    assert torch.equal(found.token_ids.cpu(), expected.token_ids)
    assert found.logprobs is not None
    assert expected.logprobs is not None
    for some, others in zip(found.logprobs.token_logprobs(5), expected.logprobs.token_logprobs(5), strict=True):
        assert_like(some, others)
    guesses = both.gpu.draft(logits.clone().to(device), rows, positions)
    assert torch.equal(guesses.cpu(), draft(logits.clone(), rows, positions, both.cpu))
    assert torch.equal(guesses, found.token_ids)


def test_endings_are_forbidden_until_min_tokens_whatever_the_host_knows_of_results(device: torch.device) -> None:
    """The position of the token says how many there are: steps may be prepared in advance."""
    state = DeviceSampling(2, VOCAB, device)
    Case(SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(6,))).add_to(state, 1)
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 6, 9]] = torch.tensor([3.0, 2.0, 1.0])
    rows = np.array([1])
    for position, expected in ((2, 9), (3, 9), (4, 2)):
        assert state.may_repeat(rows) == (position == 4)
        sampled = state.sample(logits.clone().to(device), rows, np.array([position]))
        assert sampled.token_ids.tolist() == [expected]
        state.append(rows, sampled.token_ids)


def test_penalties_count_what_is_kept(device: torch.device) -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    state = DeviceSampling(3, VOCAB, device)
    for row in range(3):
        Case(params).add_to(state, row)
    rows = np.array([2, 0])
    assert not state.may_repeat(rows)
    logits = torch.zeros(2, VOCAB)
    logits[:, 11] = 1.0
    token_ids = torch.tensor([11, 11], device=device)
    state.append(rows, token_ids, torch.tensor([True, False], device=device))
    sampled = state.sample(logits.to(device), rows, np.array([3, 3]))
    assert sampled.token_ids.tolist() == [0, 11]


def test_a_row_that_is_taken_again_remembers_nothing(device: torch.device) -> None:
    everything = SamplingParams(
        temperature=0.0,
        repetition_penalty=5.0,
        logit_bias={3: 50.0},
        allowed_token_ids=(3, 4),
        min_tokens=5,
        stop_token_ids=(4,),
        logprobs=2,
    )
    state = DeviceSampling(1, VOCAB, device)
    Case(everything, prompt=(20, 21)).add_to(state, 0)
    rows = np.array([0])
    state.append(rows, torch.tensor([22], device=device))
    state.remove(0)
    assert state.may_repeat(rows)
    Case(GREEDY, prompt=(20,)).add_to(state, 0)
    logits = torch.zeros(1, VOCAB)
    logits[0, [20, 22]] = torch.tensor([3.0, 2.0])
    sampled = state.sample(logits.to(device), rows, np.array([1]))
    assert sampled.token_ids.tolist() == [20]
    assert sampled.logprobs is None


@pytest.mark.parametrize(
    "parameters", [{"logit_bias": {300: 1.0}}, {"allowed_token_ids": (1, 300)}, {"stop_token_ids": (999,)}], ids=str
)
def test_token_ids_outside_the_vocabulary_are_refused(parameters: dict[str, Any], device: torch.device) -> None:
    with pytest.raises(InvalidRequestError, match="outside the vocabulary of 300"):
        Case(SamplingParams(**parameters)).add_to(DeviceSampling(1, VOCAB, device), 0)


def test_logprobs_are_values_once_their_tensors_are_on_the_host(device: torch.device) -> None:
    both = Both([Case(GREEDY), Case(SamplingParams(logprobs=3)), Case(SamplingParams(logprobs=0))], device)
    logprobs = both.sample(random_logits(3)).logprobs
    assert logprobs is not None
    copied = logprobs.copied(lambda tensor: tensor.to("cpu", copy=True))
    assert copied.top_ids.device.type == "cpu"
    values = copied.token_logprobs(3)
    assert values == logprobs.token_logprobs(3)
    assert [len(value) for value in values] == [0, 1, 1]
    assert [len(value[0].top_token_ids) for value in values[1:]] == [3, 0]


def test_no_places_are_fine(device: torch.device) -> None:
    none = np.arange(0)
    sampled = Both([Case(GREEDY)], device).gpu.sample(torch.zeros(0, VOCAB, device=device), none, none)
    assert sampled.token_ids.shape == sampled.is_bad.shape == (0,)


@pytest.mark.gpu
def test_the_host_waits_for_nothing() -> None:
    device = torch.device("cuda")
    state = DeviceSampling(len(MIX), VOCAB, device)
    rows = np.arange(len(MIX))
    logits = random_logits(len(MIX)).to(device)
    for is_allowed_to_wait in (True, False):  # the first time Triton loads its kernels
        torch.cuda.set_sync_debug_mode("default" if is_allowed_to_wait else "error")
        try:
            for row, params in enumerate(MIX):
                Case(params).add_to(state, row)
            for position in (2, 3):
                sampled = state.sample(logits.clone(), rows, np.full(len(rows), position))
                state.append(rows, sampled.token_ids, ~sampled.is_bad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
