"""Drafts for the next step, from the MTP layer: one pass over the step's own tokens, then one token at a time.

    position        p-1        p        p+1
    known                    token
    MTP at p-1  (hidden of p-1, token at p)      ──► draft for p+1
    MTP at p    (its own hidden, draft at p+1)   ──► draft for p+2

The first pass covers every token of every step, so that the layer's KV is there whenever drafts are wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.core.step import StepPlan
from rempart_engine.host_copies import to_device
from rempart_engine.inputs import IntArray, StepArrays, StepInputs
from rempart_engine.kept import Kept
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.model import Deepseek
from rempart_engine.places import Places


@dataclass(frozen=True, slots=True)
class _Tails:
    """Where R rows end after a step."""

    rows: NDArray[np.int64]  # [R]
    positions: NDArray[np.int64]  # [R], of the row's last token, which was just sampled
    limits: NDArray[np.int64]  # [R], how many drafts it may have, at least 1
    tokens: NDArray[np.int64]  # [R], which of the step's tokens is the one before the last


class Rows(Protocol):
    """What the drafter needs of a runner's rows."""

    def token_ids_at(self, rows: IntArray, positions: IntArray) -> torch.Tensor: ...

    def write_drafts(self, rows: IntArray, positions: IntArray, token_ids: torch.Tensor) -> None: ...

    def single_arrays(self, rows: IntArray, positions: IntArray) -> StepArrays: ...

    def inputs(self, arrays: StepArrays) -> StepInputs: ...


Guess = Callable[[torch.Tensor, NDArray[np.int64], NDArray[np.int64]], torch.Tensor]
"""From logits [R, V], rows [R] and positions [R] of the tokens to be drafted to their ids [R] int64."""


class Drafter:
    """Proposes drafts and writes them behind the rows' tokens, where the next step finds them."""

    def __init__(self, model: Deepseek, storage: KVStorage, rows: Rows, guess: Guess) -> None:
        self._model = model
        self._storage = storage
        self._rows = rows
        self._guess = guess

    def propose(
        self,
        plan: StepPlan,
        arrays: StepArrays,
        inputs: StepInputs,
        hidden: torch.Tensor,  # [T, W], the model's
        places: Places,
        kept: Kept | None,
    ) -> dict[int, int]:
        """Drafts per row, for rows that may have some; the tokens that were kept are written down already."""
        following = self._rows.token_ids_at(arrays.rows, arrays.positions + 1)
        hidden = self._model.look_further(hidden, following, inputs, self._storage)
        if kept is None:
            return {}
        tails = _tails(plan, places, kept)
        if not len(tails.rows):
            return {}
        rows, positions, limits = tails.rows, tails.positions, tails.limits
        hidden = _selected(hidden, tails.tokens)
        for number in range(1, int(limits.max()) + 1):
            still = np.flatnonzero(limits >= number)
            rows, positions, limits = rows[still], positions[still], limits[still]
            hidden = _selected(hidden, still)
            if number > 1:
                drafted = self._rows.token_ids_at(rows, positions + number - 1)
                step = self._rows.inputs(self._rows.single_arrays(rows, positions + number - 2))
                hidden = self._model.look_further(hidden, drafted, step, self._storage)
            targets = positions + number
            self._rows.write_drafts(rows, targets, self._guess(self._model.logits(hidden), rows, targets))
        return {row.row: row.max_drafts for row in plan.rows if row.max_drafts}


def _selected(hidden: torch.Tensor, tokens: NDArray[np.int64]) -> torch.Tensor:
    return hidden[to_device(tokens, hidden.device)]


def _tails(plan: StepPlan, places: Places, kept: Kept) -> _Tails:
    """Of the plan's rows that may have drafts."""
    firsts = np.cumsum([0, *(row.num_new_tokens for row in plan.rows)])
    table = [(row.max_drafts, first - row.start) for row, first in zip(plan.rows, firsts, strict=False) if row.samples]
    limits, shifts = np.array(table, np.int64).T  # a shift turns a position into a place among the step's tokens
    counts = np.bincount(places.row_numbers, kept.is_kept, len(limits)).astype(np.int64)
    wants = (limits > 0) & (counts > 0)
    last = np.flatnonzero(places.is_first)[wants] + counts[wants] - 1
    positions = places.positions[last]
    return _Tails(places.rows[last], positions, limits[wants], positions - 1 + shifts[wants])
