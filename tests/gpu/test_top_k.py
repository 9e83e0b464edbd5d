"""The exact top-k of rows of scores, against a stable sort."""

from collections.abc import Callable

import pytest
import torch

from rempart_engine.kernels.select_tokens.kernel_top_k import LARGEST_CHUNK, launch_top_k

TOP_K = 16
UNTOUCHED = -7


def choose(
    scores: torch.Tensor, lengths: list[int], top_k: int, device: torch.device, largest_chunk: int = LARGEST_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and counts of rows; behind a row lies NaN, and what is written beside the results is found out."""
    scores, max_context = scores.clone(), max(lengths)
    for row, length in zip(scores, lengths, strict=True):
        row[length:] = torch.nan
    positions = torch.full((len(lengths) + 2, top_k + 5), UNTOUCHED, dtype=torch.int32, device=device)
    counts = torch.full((len(lengths) + 2,), UNTOUCHED, dtype=torch.int32, device=device)
    ends = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    launch_top_k(scores.to(device), ends, max_context, positions[1:-1, :top_k], counts[1:-1], largest_chunk)
    positions, counts = positions.cpu(), counts.cpu()
    assert (positions[[0, -1]] == UNTOUCHED).all()
    assert (positions[:, top_k:] == UNTOUCHED).all()
    assert (counts[[0, -1]] == UNTOUCHED).all()
    return positions[1:-1, :top_k], counts[1:-1]


def check(
    scores: torch.Tensor, lengths: list[int], top_k: int, device: torch.device, largest_chunk: int = LARGEST_CHUNK
) -> None:
    positions, counts = choose(scores, lengths, top_k, device, largest_chunk)
    for row, length in enumerate(lengths):
        count = min(length, top_k)
        expected = scores[row, :length].sort(descending=True, stable=True).indices[:top_k].sort().values
        assert counts[row] == count
        assert positions[row, :count].tolist() == expected.tolist()
        assert (positions[row, count:] == -1).all()


def bits(*numbers: int) -> torch.Tensor:
    """float32 of these bits."""
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32).view(torch.float32)


def of(values: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Rows of such values in random order."""
    return lambda length: values[torch.randint(len(values), (length,))]


ROWS: dict[str, Callable[[int], torch.Tensor]] = {
    "random": torch.randn,
    "all equal": torch.ones,
    "all negative and equal": lambda length: -torch.ones(length),
    "all least": lambda length: torch.full((length,), -torch.inf),
    "two values": of(torch.tensor([-1.5, 2.5])),
    "a few above many equal ones": lambda length: (torch.rand(length) < 8 / length).float(),
    "zeros of both signs": of(torch.tensor([0.0, -0.0])),
    "zeros of both signs between others": of(torch.tensor([0.0, -0.0, 0.0, -0.0, -1e-45, 1e-45])),
    "infinities": of(torch.tensor([torch.inf, -torch.inf, 0.0, 3e38, -3e38])),
    "NaN among others": of(torch.cat([bits(0x7FC00000, 0xFFC00000, 0x7F800001), torch.tensor([torch.inf, 0.0, -1.0])])),
    "all NaN": lambda length: torch.full((length,), torch.nan),
    "subnormal": lambda length: torch.randint(-40, 40, (length,)).float() * 1e-45,
    "last bits alone differ": lambda length: 1.0 + torch.randint(0, 50, (length,)) * 2.0**-23,
    "large negative, last bits alone differ": lambda length: -3e38 * (1.0 + torch.randint(0, 50, (length,)) * 2.0**-23),
    "all magnitudes": lambda length: torch.randn(length) * 2.0 ** torch.randint(-120, 120, (length,)),
    "ascending": lambda length: torch.arange(length).float(),
    "descending": lambda length: -torch.arange(length).float(),
}


@pytest.mark.parametrize("name", ROWS)
def test_top_k_equals_a_stable_sort(name: str, device: torch.device) -> None:
    """Rows of several lengths in one launch, in one program each; then cut into chunks, in three rounds."""
    torch.manual_seed(0)
    check(torch.stack([ROWS[name](300) for _ in range(2)]), [300, 17], TOP_K, device)
    check(ROWS[name](300)[None], [300], TOP_K, device, largest_chunk=64)


@pytest.mark.parametrize("top_k", [1, 7, TOP_K, 32])
def test_rows_shorter_and_longer_than_top_k_share_a_launch(top_k: int, device: torch.device) -> None:
    lengths = [1, max(1, top_k - 1), top_k, top_k + 1, 63, 64, 65, 127, 128, 129]
    scores = torch.randint(-9, 9, (len(lengths), 192)).float()
    check(scores, lengths, top_k, device)
    check(scores, lengths, top_k, device, largest_chunk=64)


def test_long_rows(device: torch.device) -> None:
    """DeepSeek-V3.2's top-k, about where chunks end: many equal scores, and all different."""
    torch.manual_seed(0)
    lengths = [65_535, 65_536, 65_537, 2047, 2048, 2049]
    scores = torch.randn(len(lengths), 65_600)
    scores[1] = scores[1].round()
    check(scores, lengths, 2048, device)


def test_the_longest_context(device: torch.device) -> None:
    torch.manual_seed(0)
    check((100 * torch.randn(1, 163_840)).round(), [163_840], 2048, device)


def test_rows_need_not_lie_side_by_side(device: torch.device) -> None:
    scores = torch.randn(3, 200)[:, 7:150]
    check(scores, [143, 20, 70], TOP_K, device)


def test_top_k_has_a_limit(device: torch.device) -> None:
    """A round must leave less than it found."""
    with pytest.raises(ValueError, match="top-k is at most 32, got 33"):
        choose(torch.zeros(1, 70), [70], 33, device, largest_chunk=64)
