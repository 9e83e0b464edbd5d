"""Whole vocabularies at once: draws from them, and what top-p keeps of a row whose probability is spread wide."""

import numpy as np
import torch


def first_exceeding(weights: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """The first index of each row at which the running total exceeds a fraction of the whole.

    Weights float32 [R, n], fractions float64 [R] -> [R]. With a uniform random fraction this is a draw.

    Neighbours are added up until one sum per row is left, then the fraction of it finds its way back down. Every sum
    is an addition of two numbers, so no library's order of summation makes the result depend on the batch. An index
    without weight is never the answer, unless the row has none at all: then it is 0.
    """
    levels = [weights]
    while levels[-1].shape[1] > 1:
        levels.append(_pair_sums(levels[-1]))
    targets = fractions[:, None] * levels[-1]
    index = torch.zeros_like(targets, dtype=torch.int64)
    for level in reversed(levels[:-1]):
        index = 2 * index
        left = level.gather(1, index)
        last = level.shape[1] - 1
        right = torch.where(index < last, level.gather(1, (index + 1).clamp(max=last)), 0.0)
        goes_right = (targets >= left) & (right > 0)
        targets = torch.where(goes_right, targets - left, targets)
        index = index + goes_right
    return index[:, 0]


def keep_nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Probabilities [R, V] with zeros outside the smallest set that reaches `top_p` (float64 [R]).

    Likelier tokens come first, and among equals the smaller id.
    """
    ascending = sorted_values(probabilities)
    last = first_exceeding(ascending.flip(1), top_p)[:, None]
    least = ascending.gather(1, ascending.shape[1] - 1 - last)
    num_above = ascending.shape[1] - torch.searchsorted(ascending, least, right=True)
    rows, ids = torch.nonzero(probabilities == least, as_tuple=True)
    num_equal = torch.bincount(rows, minlength=len(probabilities))
    place = torch.arange(len(rows), device=rows.device) - (num_equal.cumsum(0) - num_equal)[rows]
    kept = place <= (last - num_above)[rows, 0]
    rows, ids = rows[kept], ids[kept]
    nucleus = torch.where(probabilities > least, probabilities, 0.0)
    nucleus[rows, ids] = probabilities[rows, ids]
    return nucleus


def sorted_values(values: torch.Tensor) -> torch.Tensor:
    """Each row in ascending order."""
    if values.device.type == "cpu":  # numpy's vectorised sort is many times faster than torch's, which tracks indices
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


def _pair_sums(level: torch.Tensor) -> torch.Tensor:
    """Sums of neighbours: [R, n] -> [R, ceil(n / 2)]."""
    sums = level[:, :-1:2] + level[:, 1::2]
    return torch.cat((sums, level[:, -1:]), dim=1) if level.shape[1] % 2 else sums
