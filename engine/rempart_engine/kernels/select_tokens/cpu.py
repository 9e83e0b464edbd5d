"""Index scores and top-k on a CPU.

Scores: 64 keys of a page against all heads of one query, heads side by side in vector lanes, down to the weighted sum
of what is positive without leaving the registers. Top-k: a row's K-th largest score is found half by half of its bits,
by counting; then the row is read once more for everything above it, and for as many equal ones as are missing, the
earliest first.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
from numba import njit, prange

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.cpu_scalars import INLINED, OPTIONS, load
from rempart_engine.kernels.cpu_tiles import read_e4m3_pairs, weighted_scores_bfloat16, weighted_scores_float32

SEGMENT_BLOCKS = 32
"""Blocks of one query's keys that are one piece of work."""


@njit(**INLINED)
def _read_fp8_page(page, keys):  # type: ignore[no-untyped-def]
    dim = keys.shape[1]
    for t in range(BLOCK_SIZE):
        for d in range(dim):
            keys[t, d] = load(page[t * dim + d])


@njit(**INLINED)
def _read_fp8_page_in_pairs(page, keys):  # type: ignore[no-untyped-def]
    for t in range(BLOCK_SIZE):
        read_e4m3_pairs(page, 2 * t * keys.shape[1], keys[t])


@cache
def scores_kernel(dim: int, *, is_fp8: bool, in_bfloat16: bool) -> Callable[..., None]:
    """The kernel for one key size and one kind of page; `in_bfloat16` says how products are computed.

    Pages of plain keys come as what is multiplied, and are read in place; fp8 ones as bytes.
    """
    width = dim // 2 if in_bfloat16 else dim
    kind = np.uint32 if in_bfloat16 else np.float32

    @njit(**OPTIONS)
    def index_scores(  # type: ignore[no-untyped-def]
        queries,  # [C, D, Hi] float32 or [C, D/2, Hi] pairs; Hi a multiple of 32
        weights,  # [C, Hi] float32
        pages,  # [N, 64, D] float32, [N, 64, D/2] pairs, or fp8 pages' bytes [N, 64 (D + 4)]
        scales,  # [N, ...] float32: a key's scale is behind the page's keys; only read for fp8
        block_tables,  # [B, most blocks] int32
        rows,  # [C] int32, which block table
        lengths,  # [C] int32, keys that the query sees
        num_workers,
        out,  # [C, S] float32, written up to each length
    ):
        num_segments = -(-out.shape[1] // (SEGMENT_BLOCKS * BLOCK_SIZE))
        for worker in prange(num_workers):
            keys = np.empty((BLOCK_SIZE, width), kind)
            scores = np.empty(BLOCK_SIZE, np.float32)
            for item in range(worker, queries.shape[0] * num_segments, num_workers):
                query, first_block = item // num_segments, item % num_segments * SEGMENT_BLOCKS
                num_blocks = -(-lengths[query] // BLOCK_SIZE)
                for block in range(first_block, min(first_block + SEGMENT_BLOCKS, num_blocks)):
                    block_id = block_tables[rows[query], block]
                    following = pages[block_tables[rows[query], min(block + 1, num_blocks - 1)]]
                    if is_fp8 and in_bfloat16:
                        _read_fp8_page_in_pairs(pages[block_id], keys)
                        weighted_scores_bfloat16(keys, queries[query], weights[query], following, scores)
                    elif is_fp8:
                        _read_fp8_page(pages[block_id], keys)
                        weighted_scores_float32(keys, queries[query], weights[query], following, scores)
                    elif in_bfloat16:
                        weighted_scores_bfloat16(pages[block_id], queries[query], weights[query], following, scores)
                    else:
                        weighted_scores_float32(pages[block_id], queries[query], weights[query], following, scores)
                    start = block * BLOCK_SIZE
                    for t in range(min(BLOCK_SIZE, lengths[query] - start)):
                        scale = scales[block_id, BLOCK_SIZE * dim // 4 + t] if is_fp8 else np.float32(1.0)
                        out[query, start + t] = scores[t] * scale

    return cast(Callable[..., None], index_scores)


_HALVES = 1 << 16
_SIGN = np.uint32(1 << 31)
_ALL = np.uint32((1 << 32) - 1)


@njit(**INLINED)
def _in_order(bits):  # type: ignore[no-untyped-def]
    """A float32's bits as an integer that is larger where the number is."""
    return np.uint32(bits ^ (_ALL if bits & _SIGN else _SIGN))


@njit(**INLINED)
def _bucket_of(counts, rank):  # type: ignore[no-untyped-def]
    """The bucket that holds the rank-th largest, counted from 1, and its rank among those in there."""
    bucket = len(counts) - 1
    while counts[bucket] < rank:
        rank -= counts[bucket]
        bucket -= 1
    return bucket, rank


@njit(**OPTIONS)
def thresholds_of(scores, lengths, top_k, num_workers, out):  # type: ignore[no-untyped-def]
    """The top_k-th largest of each scores[c, :lengths[c]], both as float32's bits in uint32, into out [C].

    Rows are no shorter than top_k. Two passes count a score's upper half, then the lower half of those that share it.
    """
    for worker in prange(num_workers):
        counts = np.empty(_HALVES, np.int32)
        for row in range(worker, scores.shape[0], num_workers):
            counts[:] = 0
            for s in range(lengths[row]):
                counts[_in_order(scores[row, s]) >> np.uint32(16)] += 1
            upper, rank = _bucket_of(counts, top_k)
            counts[:] = 0
            for s in range(lengths[row]):
                number = _in_order(scores[row, s])
                if number >> np.uint32(16) == upper:
                    counts[number & np.uint32(0xFFFF)] += 1
            lower, _ = _bucket_of(counts, rank)
            number = np.uint32((upper << 16) | lower)
            out[row] = number ^ (_SIGN if number & _SIGN else _ALL)


@njit(**OPTIONS)
def positions_from(scores, lengths, thresholds, num_workers, out, counts):  # type: ignore[no-untyped-def]
    """Positions of scores[c, :lengths[c]] above the row's threshold, then of the earliest equal ones, up to K.

    Into out [C, K], ascending; counts [C] says how many: K where the threshold is the K-th largest score.
    """
    for worker in prange(num_workers):
        for row in range(worker, scores.shape[0], num_workers):
            threshold, missing = thresholds[row], out.shape[1]
            for s in range(lengths[row]):
                missing -= scores[row, s] > threshold
            place = 0
            for s in range(lengths[row]):
                score = scores[row, s]
                if score > threshold or (score == threshold and missing > 0):
                    missing -= score == threshold
                    out[row, place] = s
                    place += 1
            counts[row] = place
