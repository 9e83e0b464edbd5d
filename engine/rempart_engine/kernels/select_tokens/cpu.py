"""Index scores and top-k on a CPU.

Scores: 64 keys of a page against all heads of one query, heads side by side in vector lanes, then the weighted sum of
what is positive. Top-k: the library finds the K-th largest score, and the row is read once more for everything above
it, and for as many equal ones as are missing, the earliest first.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
from numba import njit, prange

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.cpu_scalars import INLINED, OPTIONS, bfloat16_pair, load
from rempart_engine.kernels.cpu_tiles import add_product_bfloat16, add_product_float32, weighted_positive_sum

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
    num_pairs = keys.shape[1]
    for t in range(BLOCK_SIZE):
        for d in range(num_pairs):
            at = 2 * (t * num_pairs + d)
            keys[t, d] = bfloat16_pair(load(page[at]), load(page[at + 1]))


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
            scores = np.empty((BLOCK_SIZE, queries.shape[2]), np.float32)
            for item in range(worker, queries.shape[0] * num_segments, num_workers):
                query, first_block = item // num_segments, item % num_segments * SEGMENT_BLOCKS
                num_blocks = -(-lengths[query] // BLOCK_SIZE)
                for block in range(first_block, min(first_block + SEGMENT_BLOCKS, num_blocks)):
                    block_id = block_tables[rows[query], block]
                    scores[:] = np.float32(0.0)
                    if is_fp8 and in_bfloat16:
                        _read_fp8_page_in_pairs(pages[block_id], keys)
                        add_product_bfloat16(keys, queries[query], scores)
                    elif is_fp8:
                        _read_fp8_page(pages[block_id], keys)
                        add_product_float32(keys, queries[query], scores)
                    elif in_bfloat16:
                        add_product_bfloat16(pages[block_id], queries[query], scores)
                    else:
                        add_product_float32(pages[block_id], queries[query], scores)
                    start = block * BLOCK_SIZE
                    for t in range(min(BLOCK_SIZE, lengths[query] - start)):
                        score: Any = weighted_positive_sum(scores, weights[query], t)  # type: ignore[call-arg]  # numba
                        out[query, start + t] = score * scales[block_id, BLOCK_SIZE * dim // 4 + t] if is_fp8 else score

    return cast(Callable[..., None], index_scores)


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
