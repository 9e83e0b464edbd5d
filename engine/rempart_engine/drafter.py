"""Drafts for the next step, from the MTP layer: one pass over the step's own tokens, then one token at a time.

    position        p-1        p        p+1
    known                    token
    MTP at p-1  (hidden of p-1, token at p)      ──► draft for p+1
    MTP at p    (its own hidden, draft at p+1)   ──► draft for p+2

The first pass covers every token of every step, so that the layer's KV is there whenever drafts are wanted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.core.step import StepPlan, TokenLogprob
from rempart_engine.inputs import RowTable, StepInputs
from rempart_engine.kv_storage import KVStorage
from rempart_engine.logprobs import RowLogprobs
from rempart_engine.model.deepseek.model import Deepseek
from rempart_engine.places import Places
from rempart_engine.sampler import draft
from rempart_engine.sampling_rows import SamplingRows

SampledRow = tuple[bool, tuple[int, ...], tuple[TokenLogprob, ...]]
"""Whether the row failed, its new tokens, and their log-probabilities."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What sampling brought for P places of R rows, on the host."""

    token_ids: NDArray[np.int64]  # [P]
    is_kept: NDArray[np.bool_]  # [P]
    is_bad: NDArray[np.bool_]  # [R]
    logprobs: RowLogprobs | None

    def by_row(self, places: Places) -> Iterator[SampledRow]:
        """Row by row, in the order of the plan."""
        ids = self.token_ids.tolist()
        logprobs = self.logprobs.token_logprobs(len(ids)) if self.logprobs else [()] * len(ids)
        firsts = np.flatnonzero(places.is_first).tolist()
        counts = np.bincount(places.row_numbers, self.is_kept, len(firsts)).astype(np.int64).tolist()
        for first, count, is_bad in zip(firsts, counts, self.is_bad.tolist(), strict=True):
            end = first + count
            yield is_bad, tuple(ids[first:end]), tuple(value for entry in logprobs[first:end] for value in entry)


class Drafter:
    """Proposes drafts and writes them behind the rows' tokens, where the next step finds them."""

    def __init__(self, model: Deepseek, storage: KVStorage, rows: RowTable, sampling: SamplingRows) -> None:
        self._model = model
        self._storage = storage
        self._rows = rows
        self._sampling = sampling

    def propose(
        self,
        plan: StepPlan,
        inputs: StepInputs,
        hidden: torch.Tensor,  # [T, W], the model's
        places: Places,
        kept: Kept | None,
    ) -> dict[int, int]:
        """Drafts per row, for rows that may have some; the tokens that were kept are written down already."""
        rows_of_tokens = np.array([row.row for row in plan.rows])[inputs.token_rows.numpy()]
        following = self._rows.token_ids_at(rows_of_tokens, inputs.positions.numpy() + 1)
        hidden = self._model.look_further(hidden, torch.from_numpy(following), inputs, self._storage)
        if kept is None:
            return {}
        rows, positions, limits, tokens = _wanting(plan, places, kept)
        if not len(rows):
            return {}
        hidden = hidden[torch.from_numpy(tokens)]
        for number in range(1, int(limits.max()) + 1):
            still = limits >= number
            rows, positions, limits = rows[still], positions[still], limits[still]
            hidden = hidden[torch.from_numpy(still)]
            if number > 1:
                drafted = self._rows.token_ids_at(rows, positions + number - 1)
                step = self._rows.single_inputs(rows, positions + number - 2)
                hidden = self._model.look_further(hidden, torch.from_numpy(drafted), step, self._storage)
            targets = positions + number
            guesses = draft(self._model.logits(hidden), rows, targets, self._sampling)
            self._rows.write_drafts(rows, targets, guesses.cpu().numpy())
        return {row.row: row.max_drafts for row in plan.rows if row.max_drafts}


def _wanting(
    plan: StepPlan, places: Places, kept: Kept
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of rows that may have drafts [R]: row, position of its last token, how many drafts, and which of the step's
    tokens is the one before its last."""
    limits = np.array([row.max_drafts for row in plan.rows if row.samples], np.int64)
    starts = np.array([row.start for row in plan.rows if row.samples], np.int64)
    ends = np.cumsum([row.num_new_tokens for row in plan.rows])
    firsts = (ends - [row.num_new_tokens for row in plan.rows])[[row.samples for row in plan.rows]]
    counts = np.bincount(places.row_numbers, kept.is_kept, len(limits)).astype(np.int64)
    first_places = np.flatnonzero(places.is_first)
    wants = (limits > 0) & (counts > 0)
    last = first_places[wants] + counts[wants] - 1
    positions = places.positions[last]
    return places.rows[last], positions, limits[wants], firsts[wants] + positions - 1 - starts[wants]
