"""The counter-based generator against its published answers and against chance."""

import numpy as np
import pytest

from rempart_engine.philox import philox4x32, uniforms

# Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_blocks_equal_the_known_answers_of_random123(counter: str, key: str, result: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(result).tolist()


def test_many_blocks_at_once_equal_each_alone() -> None:
    counters = np.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.stack([words(key) for _, key, _ in KNOWN_ANSWERS])
    expected = np.stack([words(result) for _, _, result in KNOWN_ANSWERS])
    assert np.array_equal(philox4x32(counters, keys), expected)


def draws(num: int, seed: int = 0, choice: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return uniforms(np.full(num, seed, np.uint64), np.arange(num), np.full(num, choice))


def test_numbers_are_spread_evenly_over_the_open_interval() -> None:
    numbers = draws(100_000, seed=7)
    assert numbers.min() > 0.0
    assert numbers.max() < 1.0
    observed = np.bincount((numbers * 100).astype(np.int64), minlength=100)
    chi_square = ((observed - 1000.0) ** 2 / 1000.0).sum()
    assert 40 < chi_square < 180  # 99 degrees of freedom: both tails far below one in a million


def test_seed_choice_and_position_each_change_the_number() -> None:
    rows = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    seeds, positions, choices = (np.array(column) for column in zip(*rows, strict=True))
    assert len(set(uniforms(seeds.astype(np.uint64), positions, choices).tolist())) == len(rows)


def test_neighbouring_seeds_and_positions_are_uncorrelated() -> None:
    first, second = draws(20_000, seed=1), draws(20_000, seed=2)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(first, draws(20_000, seed=1, choice=1))[0, 1]) < 0.03
