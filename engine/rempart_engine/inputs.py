"""From a StepPlan to the tensors of one step, over rows that persist from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.core.scheduler_config import MAX_SPECULATIVE_TOKENS
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan

TILE_TOKENS = 16
"""Most query tokens of one sequence that attention handles as one piece of work."""

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tensors of one step: T new tokens of B sequences, in the order of the plan's rows."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int32, of the token in its sequence
    token_rows: torch.Tensor  # [T] int32, index among the B sequences
    slots: torch.Tensor  # [T] int64, block id * 64 + offset: where its KV goes
    block_tables: torch.Tensor  # [B, most blocks of a sequence] int32
    tile_rows: torch.Tensor  # [tiles] int32, index among the B sequences
    tile_tokens: torch.Tensor  # [tiles] int32, first of the T tokens
    tile_sizes: torch.Tensor  # [tiles] int32, at most TILE_TOKENS
    output_tokens: torch.Tensor  # [O] int64, which of the T tokens need logits
    max_context: int
    """No token of the step sees more tokens than this, itself included. On the host, so that no GPU must be asked."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step on the host: what `StepInputs` holds but the token ids, which only the device may know."""

    rows: IntArray  # [T], the runner's row of each token
    positions: IntArray  # [T] int32
    token_rows: IntArray  # [T] int32
    slots: IntArray  # [T] int64
    block_tables: IntArray  # [B, most blocks of a sequence] int32
    tile_rows: IntArray  # [tiles] int32
    tile_tokens: IntArray  # [tiles] int32
    tile_sizes: IntArray  # [tiles] int32
    output_tokens: IntArray  # [O] int64
    max_context: int


_SHARED = tuple(field.name for field in fields(StepInputs) if field.name not in ("token_ids", "max_context"))


class RowTable:
    """What a runner keeps per row: the tokens of its sequence and its block table."""

    def __init__(self, max_num_rows: int, max_model_len: int) -> None:
        # Beyond the model's length: the last sampled token is never computed, but it is written down; and a draft is
        # proposed before it is known whether the sequence ends, up to two places further.
        self._token_ids = np.zeros((max_num_rows, max_model_len + MAX_SPECULATIVE_TOKENS), np.int64)
        self._block_tables = np.zeros((max_num_rows, -(-max_model_len // BLOCK_SIZE)), np.int32)
        self._num_tokens = np.zeros(max_num_rows, np.int64)
        self._num_blocks = np.zeros(max_num_rows, np.int64)

    def start(self, new: NewRow) -> None:
        """Write a row anew."""
        self._token_ids[new.row, : len(new.token_ids)] = new.token_ids
        self._num_tokens[new.row] = len(new.token_ids)
        self._num_blocks[new.row] = 0
        self._append_blocks(new.row, new.block_ids)

    def append_tokens(self, rows: IntArray, positions: IntArray, token_ids: IntArray) -> None:
        """Sampled tokens [R] with their places; those of one row follow its last token in order."""
        self._token_ids[rows, positions] = token_ids
        np.add.at(self._num_tokens, rows, 1)

    def write_drafts(self, rows: IntArray, positions: IntArray, token_ids: torch.Tensor) -> None:
        """Guesses [R] beyond the rows' tokens, which are not theirs until appended."""
        self._token_ids[rows, positions] = token_ids.numpy()

    def token_ids(self, row: int, start: int, stop: int) -> IntArray:
        """Tokens [start, stop) of a row's sequence, as far as it has them."""
        return self._token_ids[row, start : min(stop, int(self._num_tokens[row]))]

    def token_ids_at(self, rows: IntArray, positions: IntArray) -> torch.Tensor:
        """What is written in these places [R], tokens or drafts."""
        return torch.from_numpy(self._token_ids[rows, positions])

    def inputs(self, arrays: StepArrays) -> StepInputs:
        """Tensors of a step."""
        return StepInputs(
            token_ids=self.token_ids_at(arrays.rows, arrays.positions),
            max_context=arrays.max_context,
            **{name: torch.from_numpy(getattr(arrays, name)) for name in _SHARED},
        )

    def arrays(self, plan: StepPlan) -> StepArrays:
        """Numbers of the plan; new rows must have been started."""
        for scheduled in plan.rows:
            if scheduled.new_block_ids:
                self._append_blocks(scheduled.row, scheduled.new_block_ids)
        rows, starts, counts = _columns(plan.rows)
        return self._arrays(rows, starts, counts, _output_tokens(plan.rows, counts))

    def single_arrays(self, rows: IntArray, positions: IntArray) -> StepArrays:
        """Numbers for one token of each of the rows [R]; all of them are outputs."""
        return self._arrays(rows, positions, np.ones_like(rows), np.arange(len(rows)))

    def _arrays(self, rows: IntArray, starts: IntArray, counts: IntArray, output_tokens: IntArray) -> StepArrays:
        ends = np.cumsum(counts)
        firsts = ends - counts
        sequence = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(ends[-1]) + (starts - firsts)[sequence]
        row_of_token = rows[sequence]
        blocks = self._block_tables[row_of_token, positions // BLOCK_SIZE].astype(np.int64)
        max_context = int((starts + counts).max())
        tile_rows, tile_tokens, tile_sizes = cut_into_tiles(firsts, counts)
        return StepArrays(
            rows=row_of_token,
            positions=positions.astype(np.int32),
            token_rows=sequence.astype(np.int32),
            slots=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            block_tables=self._block_tables[rows, : -(-max_context // BLOCK_SIZE)],
            tile_rows=tile_rows.astype(np.int32),
            tile_tokens=tile_tokens.astype(np.int32),
            tile_sizes=tile_sizes.astype(np.int32),
            output_tokens=output_tokens,
            max_context=max_context,
        )

    def _append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        held = int(self._num_blocks[row])
        self._block_tables[row, held : held + len(block_ids)] = block_ids
        self._num_blocks[row] = held + len(block_ids)


def _columns(rows: tuple[ScheduledRow, ...]) -> tuple[IntArray, IntArray, IntArray]:
    """Row number, start and number of new tokens of each scheduled row, each [B]."""
    table = np.array([(scheduled.row, scheduled.start, scheduled.num_new_tokens) for scheduled in rows], np.int64)
    return table[:, 0], table[:, 1], table[:, 2]


def cut_into_tiles(firsts: IntArray, counts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Cut each sequence's new tokens into tiles: sequence, first token and size of each."""
    per_sequence = -(-counts // TILE_TOKENS)
    sequence = np.repeat(np.arange(len(counts)), per_sequence)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    offset = number * TILE_TOKENS
    return sequence, firsts[sequence] + offset, np.minimum(TILE_TOKENS, counts[sequence] - offset)


def num_outputs(row: ScheduledRow) -> int:
    """How many of the row's last new tokens have logits: one and its drafts, or all for prompt log-probabilities."""
    if row.wants_prompt_logprobs:
        return row.num_new_tokens
    return row.num_draft_tokens + 1 if row.samples else 0


def _output_tokens(rows: tuple[ScheduledRow, ...], counts: IntArray) -> IntArray:
    """Which of the step's tokens have logits, given how many new tokens [B] each row has."""
    wanted = np.array([num_outputs(row) for row in rows], np.int64)
    before = np.cumsum(wanted) - wanted
    places: IntArray = np.arange(wanted.sum()) + np.repeat(np.cumsum(counts) - wanted - before, wanted)
    return places
