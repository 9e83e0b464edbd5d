"""Small steps in a few fixed shapes, so that each shape is captured once as a graph and replayed.

Every token of such a step counts as a sequence of its own, with its own copy of the block table. Decoding rows, rows
with drafts and short pieces of prompts then have one shape: a number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepArrays

_CONTEXTS = (2048, 16_384, 131_072)
"""Kernels divide their work by the longest context they may meet: 2,048 is what an indexer chooses at most."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One shape."""

    num_tokens: int
    max_context: int


def buckets(max_tokens: int, max_model_len: int) -> tuple[Bucket, ...]:
    """All shapes, least first: powers of two up to `max_tokens`, and contexts up to the model's."""
    counts = [1 << power for power in range(max_tokens.bit_length()) if 1 << power <= max_tokens]
    if counts and counts[-1] < max_tokens:
        counts.append(max_tokens)
    contexts = [*(context for context in _CONTEXTS if context < max_model_len), max_model_len]
    return tuple(Bucket(count, context) for count in counts for context in contexts)


def bucket_for(arrays: StepArrays, among: Sequence[Bucket]) -> Bucket | None:
    """The least shape that holds the step; None if it is too large for all."""
    num_tokens = len(arrays.positions)
    fitting = (b for b in among if b.num_tokens >= num_tokens and b.max_context >= arrays.max_context)
    return min(fitting, default=None)


def filling(bucket: Bucket) -> StepArrays:
    """A step of the bucket's shape whose tokens are all at position 0 of row 0 and store nothing (slot -1)."""
    count = bucket.num_tokens
    every = np.arange(count, dtype=np.int32)
    return StepArrays(
        rows=np.zeros(count, np.int64),
        positions=np.zeros(count, np.int32),
        token_rows=every,
        slots=np.full(count, -1, np.int64),
        block_tables=np.zeros((count, -(-bucket.max_context // BLOCK_SIZE)), np.int32),
        tile_rows=every,
        tile_tokens=every,
        tile_sizes=np.ones(count, np.int32),
        output_tokens=every.astype(np.int64),
        max_context=bucket.max_context,
    )


def flattened(arrays: StepArrays, bucket: Bucket) -> StepArrays:
    """The step in the bucket's shape, filled up."""
    result, count = filling(bucket), len(arrays.positions)
    result.rows[:count] = arrays.rows
    result.positions[:count] = arrays.positions
    result.slots[:count] = arrays.slots
    result.block_tables[:count, : arrays.block_tables.shape[1]] = arrays.block_tables[arrays.token_rows]
    return result
