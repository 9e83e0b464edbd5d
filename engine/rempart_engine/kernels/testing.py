"""Steps for tests of kernels and benchmarks, without a scheduler."""

import numpy as np
import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs, cut_into_tiles


def make_step(lengths: list[tuple[int, int]], num_blocks: int) -> StepInputs:
    """A step of sequences, given by context and new tokens, whose blocks lie in random places of the pool."""
    free = np.random.default_rng(5).permutation(num_blocks)
    tables = np.zeros((len(lengths), max(-(-context // BLOCK_SIZE) for context, _ in lengths)), np.int32)
    taken = 0
    for row, (context, _) in enumerate(lengths):
        count = -(-context // BLOCK_SIZE)
        tables[row, :count] = free[taken : taken + count]
        taken += count
    positions = np.concatenate([np.arange(context - new, context) for context, new in lengths])
    sequence = np.repeat(np.arange(len(lengths)), [new for _, new in lengths])
    slots = tables[sequence, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    counts = np.array([new for _, new in lengths])
    tile_rows, tile_tokens, tile_sizes = cut_into_tiles(np.cumsum(counts) - counts, counts)
    return StepInputs(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.from_numpy(positions.astype(np.int32)),
        token_rows=torch.from_numpy(sequence.astype(np.int32)),
        slots=torch.from_numpy(slots),
        block_tables=torch.from_numpy(tables),
        tile_rows=torch.from_numpy(tile_rows.astype(np.int32)),
        tile_tokens=torch.from_numpy(tile_tokens.astype(np.int32)),
        tile_sizes=torch.from_numpy(tile_sizes.astype(np.int32)),
        output_tokens=torch.zeros(0, dtype=torch.int64),
        max_context=int(positions.max()) + 1,
    )
