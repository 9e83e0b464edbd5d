"""The choice of tokens on a GPU against its meaning in float64."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from rempart_engine.kernels.sample import Draws, choose, reference
from rempart_engine.kernels.sample.kernel import Tiles, choose_on_gpu, random_fraction
from rempart_engine.kernels.sample.testing import is_choice
from rempart_engine.kernels.target import INTERPRETED
from rempart_engine.philox import uniforms

FINE = Tiles(chunk=128, tile=128, candidates=64)
"""So that few tokens need many chunks, and more passes over them before what is left fits into registers."""


def make_draws(num_rows: int, seed: int = 0, **columns: Any) -> Draws:
    """Random seeds, choices and positions; the other columns plain, or as given, repeated to the number of rows."""
    rng = np.random.default_rng(seed)
    plain: dict[str, Any] = {"is_greedy": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    types = {"is_greedy": np.bool_, "temperature": np.float32, "top_k": np.int64, "top_p": np.float64}
    filters: dict[str, Any] = {
        name: np.resize(np.asarray(columns.get(name, value), types.get(name, np.float64)), num_rows)
        for name, value in plain.items()
    }
    return Draws(
        **filters,
        seed=rng.integers(0, 2**64, num_rows, np.uint64),
        choice=rng.integers(0, 4, num_rows),
        positions=rng.integers(0, 163_840, num_rows),
    )


def part(draws: Draws, rows: list[int]) -> Draws:
    return Draws(**{field.name: getattr(draws, field.name)[rows] for field in dataclasses.fields(draws)})


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def assert_chooses(logits: torch.Tensor, draws: Draws, device: torch.device, tiles: Tiles | None = None) -> None:
    """Each row's token is one that the reference may choose."""
    token_ids, is_bad = choose_on_gpu(logits.to(device), draws, tiles)
    assert not is_bad.any()
    for place, token_id in enumerate(token_ids.tolist()):
        assert is_choice(token_id, logits[place], draws, place), (place, part(draws, [place]), token_id)


# Random numbers.


@triton.jit  # type: ignore[untyped-decorator]
def _fractions(seeds: Any, choices: Any, positions: Any, out: Any, BLOCK: tl.constexpr) -> None:  # noqa: N803
    i = tl.arange(0, BLOCK)
    tl.store(out + i, random_fraction(tl.load(seeds + i), tl.load(choices + i), tl.load(positions + i)).to(tl.int64))


def test_random_numbers_are_those_of_the_host_to_the_bit(device: torch.device) -> None:
    draws = make_draws(512)
    draws.seed[:4] = 0, 2**64 - 1, 2**63, 2**32
    draws.positions[:4] = 0, 2**31, 2**32 - 1, 1
    columns = [torch.from_numpy(c).to(device) for c in (draws.seed.view(np.int64), draws.choice, draws.positions)]
    found = torch.empty(512, dtype=torch.int64, device=device)
    _fractions[(1,)](*columns, found, BLOCK=512)
    expected = uniforms(draws.seed, draws.positions, draws.choice) * 2.0**64
    assert np.array_equal(found.cpu().numpy().view(np.uint64), expected.astype(np.uint64))
    assert np.array_equal(expected.astype(np.uint64).astype(np.float64), expected)


# Choices.

MIX: dict[str, Any] = {
    "is_greedy": [False, False, True, False, False, False, False, False],
    "temperature": [1.0, 0.3, 1.0, 5.0, 0.8],
    "top_k": [0, 5, 0, 0, 90, 0, 1, 0, 300, 2],
    "top_p": [1.0, 1.0, 0.9, 0.4, 0.95, 1.0, 0.999],
    "min_p": [0.0, 0.0, 0.0, 0.05],
}


@pytest.mark.parametrize(
    ("vocab_size", "tiles", "has_ties"),
    [(1, None, False), (77, None, True), (300, FINE, False), (300, FINE, True), (2500, None, True)],
    ids=str,
)
def test_mixed_rows_choose_what_the_reference_does(
    vocab_size: int, tiles: Tiles | None, has_ties: bool, device: torch.device
) -> None:
    num_rows = (24 if INTERPRETED else 3000) if vocab_size > 1 else 3
    logits = random_logits(num_rows, vocab_size, vocab_size)
    logits[1::5, ::3] = -torch.inf
    logits[1::5, :1] = 0.5
    draws = make_draws(num_rows, vocab_size + has_ties, **MIX)
    assert_chooses(logits.round() if has_ties else logits, draws, device, tiles)


def test_draws_without_filters_choose_what_the_reference_does(device: torch.device) -> None:
    num_rows = 100 if INTERPRETED else 20_000
    draws = make_draws(num_rows, temperature=[0.5, 1.0, 2.0, 100.0], min_p=[0.0, 0.0, 0.02])
    assert_chooses(random_logits(num_rows, 300), draws, device)


@pytest.mark.parametrize(
    "columns",
    [
        {"top_k": [1, 64, 299]},
        {"top_p": [1e-9, 1e-30, 1 - 2**-53]},
        {"top_k": 400, "top_p": 0.5},
        {"min_p": [1.0, 1e-12]},
        {"temperature": [1e-6, 1e-5, 100.0], "top_p": 0.9},
    ],
    ids=str,
)
def test_extreme_filters_choose_what_the_reference_does(columns: dict[str, Any], device: torch.device) -> None:
    assert_chooses(random_logits(3, 300), make_draws(3, **columns), device, FINE)


def test_equal_tokens_are_kept_by_id(device: torch.device) -> None:
    """All alike, or all but one: then a filter ends among them."""
    logits = torch.zeros(5, 500)
    logits[2:, 417] = 3.0
    draws = make_draws(5, top_k=[0, 200, 0, 150, 333], top_p=[0.5, 1.0, 0.6, 1.0, 0.5])
    assert_chooses(logits, draws, device, FINE)
    greedy = make_draws(4, is_greedy=True)
    logits = torch.zeros(4, 500)
    logits[0, :7], logits[1, ::2], logits[2, [499, 130, 257]], logits[3, 0] = -0.0, -0.0, 1.0, -torch.inf
    assert choose(logits.to(device), greedy).token_ids.tolist() == [0, 0, 130, 1]


def test_half_of_two_equals_is_the_first(device: torch.device) -> None:
    logits = torch.full((40, 20), -torch.inf)
    logits[:, [5, 11]] = 1.25
    draws = make_draws(40 if not INTERPRETED else 8, top_p=[0.5, 0.500001])
    token_ids = choose(logits[: len(draws)].to(device), draws).token_ids
    assert set(token_ids[::2].tolist()) == {5}
    assert set(token_ids[1::2].tolist()) == {5, 11}


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e38])
def test_logits_of_any_size(offset: float, device: torch.device) -> None:
    """Far from 0, or with tokens masked by the least of all numbers."""
    logits = random_logits(4, 200).bfloat16().float() + offset
    logits[:, ::7] = torch.finfo(torch.float32).min
    draws = make_draws(4, top_k=[0, 20], top_p=[1.0, 1.0, 0.7])
    assert_chooses(logits, draws, device, FINE)


def test_values_that_halving_does_not_separate_are_found_all_the_same(device: torch.device) -> None:
    """More tokens than candidates between two neighbours by value, and near 0, where floats are densest."""
    logits = torch.cat((torch.full((200,), 1e-30), torch.arange(1, 101) * 1e-38, torch.tensor([4.0])))
    draws = make_draws(4, top_k=[101, 230, 250, 290])
    assert_chooses(logits.expand(4, -1).contiguous(), draws, device, FINE)


# What a row's choice depends on.


def test_neither_companions_nor_tiles_nor_strides_change_a_choice(device: torch.device) -> None:
    draws = make_draws(12, 4, **MIX)
    wide = random_logits(12, 350).to(device)
    logits = wide[:, :300]
    together = choose(logits, draws).token_ids.tolist()
    assert choose_on_gpu(logits.contiguous(), draws, FINE)[0].tolist() == together
    order = [7, 0, 11, 4]
    assert choose(logits[order], part(draws, order)).token_ids.tolist() == [together[row] for row in order]
    assert [choose(logits[row : row + 1], part(draws, [row])).token_ids.item() for row in (2, 4)] == [
        together[row] for row in (2, 4)
    ]


def test_rows_where_no_token_can_be_chosen_are_bad_alone(device: torch.device) -> None:
    logits = random_logits(10, 300)
    logits[0, 299], logits[1, 0], logits[2], logits[3, 5], logits[4] = torch.nan, torch.inf, -torch.inf, -torch.inf, 0.0
    logits[5:] = logits[:5]
    draws = make_draws(10, top_k=[0, 30, 0], is_greedy=[False] * 5 + [True] * 5)
    token_ids, is_bad = choose_on_gpu(logits.to(device), draws)
    assert is_bad.tolist() == [True, True, True, False, False] * 2
    assert ((token_ids >= 0) & (token_ids < 300)).all()
    for row in (3, 4, 8, 9):
        assert is_choice(int(token_ids[row]), logits[row], draws, row)


def test_draws_at_many_positions_follow_the_distribution(device: torch.device) -> None:
    num_draws = 150 if INTERPRETED else 40_000
    logits = random_logits(1, 9, seed=3, scale=1.0)
    draws = dataclasses.replace(make_draws(num_draws, min_p=0.25, temperature=1.5), positions=np.arange(num_draws))
    draws.seed[:], draws.choice[:] = 7, 1
    token_ids = choose(logits.expand(num_draws, -1).contiguous().to(device), draws).token_ids.cpu()
    weights = reference.kept_weights(logits[0], 1.5, 0, 1.0, 0.25)
    expected = weights / weights.sum() * num_draws
    observed = torch.bincount(token_ids, minlength=9)
    assert not observed[expected == 0].any()
    used = expected > 0
    assert 4 <= used.sum() < 9
    assert float(((observed - expected)[used] ** 2 / expected[used]).sum()) < 30  # at most 7 degrees of freedom


def test_a_whole_vocabulary(device: torch.device) -> None:
    logits = random_logits(2, 129_280, scale=1.0)
    logits[1] = logits[1].round()  # thousands of equals: a filter ends among them
    draws = make_draws(2, temperature=[1.0, 3.0], top_k=[0, 50_000], top_p=[0.9, 0.7])
    # The interpreter takes its time for each tile, not for each token.
    assert_chooses(logits, draws, device, Tiles(chunk=16_384, tile=65_536, candidates=4096) if INTERPRETED else None)


def test_no_rows_are_fine(device: torch.device) -> None:
    chosen = choose(torch.empty(0, 30, device=device), make_draws(0))
    assert chosen.token_ids.shape == chosen.is_bad.shape == (0,)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 30), r"logits must be \[3, V\]"),
        (torch.zeros(3), r"logits must be \[3, V\]"),
        (torch.zeros(3, 30, dtype=torch.bfloat16), "float32"),
        (torch.zeros(30, 3).T, "side by side"),
        (torch.zeros(3, 0), "1 to 262144"),
        (torch.zeros(1, 1).expand(3, 2**18 + 1), "1 to 262144"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(logits, make_draws(3))
