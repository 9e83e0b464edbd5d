"""The most likely tokens of many rows at once, and draws from them, without sorting whole vocabularies.

A row's candidates are *all* tokens whose value reaches a threshold of that row, in one order: by value, then by id.
So what is found is a function of the row alone, whatever the threshold, equal values or the other rows.
"""

from dataclasses import dataclass

import torch

from rempart_engine.nucleus import sorted_values

_BLOCK = 64
_NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens of R rows, most likely first; a row shorter than the longest goes on with id 0 and `floor`."""

    ids: torch.Tensor  # [R, M] int64
    values: torch.Tensor  # [R, M]
    counts: torch.Tensor  # [R] int64


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters of R rows; neutral values are V, 1 and 0."""

    top_k: torch.Tensor  # [R] int64
    top_p: torch.Tensor  # [R] float64
    min_p: torch.Tensor  # [R] float64


def count_thresholds(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Thresholds [R] which at least `counts` [R] values of each row reach, and usually not many more."""
    most, vocab_size = int(counts.max()), values.shape[1]
    blocks = _blocks(values, -torch.inf).amax(dim=2)
    if most > blocks.shape[1]:
        return sorted_values(values).gather(1, vocab_size - counts[:, None])[:, 0]
    # Each block's largest value is a value: the c-th largest of these is reached by c values or more.
    return blocks.topk(most, dim=1).values.gather(1, counts[:, None] - 1)[:, 0]


def at_least(values: torch.Tensor, thresholds: torch.Tensor, floor: float) -> Candidates:
    """All tokens of `values` [R, V] that reach their row's threshold and are above the floor."""
    num_rows = len(values)
    blocks = _blocks(values, floor)
    block_rows, block_numbers = torch.nonzero(blocks.amax(dim=2) >= thresholds[:, None], as_tuple=True)
    elements = blocks[block_rows, block_numbers]  # [blocks that count, 64]
    places, offsets = torch.nonzero((elements >= thresholds[block_rows, None]) & (elements > floor), as_tuple=True)
    rows = block_rows[places]
    counts = torch.bincount(rows, minlength=num_rows)
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = int(counts.max()) if num_rows else 0
    ids = rows.new_zeros((num_rows, width))
    ids[rows, columns] = block_numbers[places] * _BLOCK + offsets
    found = values.new_full((num_rows, width), floor)
    found[rows, columns] = elements[places, offsets]
    # They come by id; a stable sort keeps that order among equals.
    found, order = found.sort(dim=1, descending=True, stable=True)
    return Candidates(ids.gather(1, order), found, counts)


def draw(
    candidates: Candidates, filters: Filters, holds_top_k: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filter by top-k, top-p, min-p in this order, and draw one token id a row.

    The draw itself goes through the kept tokens by id, not by value: a similar row, such as one that a draft is drawn
    from, then has most tokens at about the same fraction, where by value two tokens that change places take others'.

    Args:
        candidates: their values are probabilities, of which all of a row's vocabulary sum to 1.
        holds_top_k: whether every token that top-k keeps is among a row's candidates, bool [R].
        uniforms: float64 [R] in (0, 1).

    Returns:
        Token ids [R], and whether each row's candidates were enough to know where its filters end [R].
    """
    values = candidates.values.double()
    columns = torch.arange(values.shape[1], device=values.device)
    kept = columns < filters.top_k[:, None]
    cumulative = (values * kept).cumsum(dim=1)  # in order, so that padding after a row's end changes nothing
    before = torch.nn.functional.pad(cumulative, (1, 0))[:, :-1]
    wanted = filters.top_p * torch.where(holds_top_k, cumulative[:, -1], 1.0)
    enough = holds_top_k | (cumulative[:, -1] >= wanted)
    kept &= (before < wanted[:, None]) & (values > 0) & (values >= filters.min_p[:, None] * values[:, :1])
    kept[:, :1] = True  # whatever rounding makes of the filters, the likeliest token passes them
    ids, order = torch.where(kept, candidates.ids, _NO_ID).sort(dim=1)
    last = kept.sum(dim=1, keepdim=True) - 1
    cumulative = (values * kept).gather(1, order).cumsum(dim=1)
    targets = uniforms[:, None] * cumulative.gather(1, last)
    places = torch.minimum((cumulative <= targets).sum(dim=1, keepdim=True), last)
    return ids.gather(1, places)[:, 0], enough


def _blocks(values: torch.Tensor, padding: float) -> torch.Tensor:
    """Runs of 64 tokens: [R, ceil(V / 64), 64]."""
    rest = -values.shape[1] % _BLOCK
    if rest:
        values = torch.nn.functional.pad(values, (0, rest), value=padding)
    return values.reshape(len(values), values.shape[1] // _BLOCK, _BLOCK)
