"""Paged attention on a CPU: online softmax over KV blocks, several query rows of one KV head at a time.

Keys lie transposed in their block ([D, 64]) so that both products run along contiguous memory: the scores of 64 keys
grow together over D, and the output's D values grow together over the keys. Each result is a fixed sequence of fused
multiply-adds over its own row, whatever else is in the tile: a token computed alone, in a chunk, or again after
preemption gets the same bits.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
from numba import njit, prange

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.cpu_scalars import INLINED, OPTIONS, exp, load, round_to

HALF = BLOCK_SIZE // 2
_LOWEST = np.float32(-1e30)
"""Below every score, and still finite, so that differences are."""
ROW_GROUP = 4
"""Query rows that go through the inner loops together; enough to hide load latency, few enough for registers."""


@njit(**INLINED)
def _add_scores(queries, keys, scores, first, dim):  # type: ignore[no-untyped-def]
    """scores[first:first+4, :] = queries[first:first+4, :] @ keys for keys of shape [D, 64]."""
    for t in range(BLOCK_SIZE):
        for g in range(ROW_GROUP):
            scores[first + g, t] = np.float32(0.0)
    for d in range(0, dim, 4):
        for t in range(BLOCK_SIZE):
            k0, k1, k2, k3 = keys[d, t], keys[d + 1, t], keys[d + 2, t], keys[d + 3, t]
            for g in range(ROW_GROUP):
                row = first + g
                score = scores[row, t]
                score += queries[row, d] * k0
                score += queries[row, d + 1] * k1
                score += queries[row, d + 2] * k2
                score += queries[row, d + 3] * k3
                scores[row, t] = score


@njit(**INLINED)
def _add_values(weights, values, num_keys, outputs, first, dim):  # type: ignore[no-untyped-def]
    """outputs[first:first+4, :] += weights[first:first+4, :num_keys] @ values for values of shape [64, D]."""
    whole = num_keys - num_keys % 4
    for t in range(0, whole, 4):
        for d in range(dim):
            v0, v1, v2, v3 = values[t, d], values[t + 1, d], values[t + 2, d], values[t + 3, d]
            for g in range(ROW_GROUP):
                row = first + g
                total = outputs[row, d]
                total += weights[row, t] * v0
                total += weights[row, t + 1] * v1
                total += weights[row, t + 2] * v2
                total += weights[row, t + 3] * v3
                outputs[row, d] = total
    for t in range(whole, num_keys):
        for d in range(dim):
            value = values[t, d]
            for g in range(ROW_GROUP):
                outputs[first + g, d] += weights[first + g, t] * value


@njit(**INLINED)
def _largest(scores, row, scratch):  # type: ignore[no-untyped-def]
    """Maximum of a row of 64, by halving: vectorisable."""
    for t in range(HALF):
        scratch[t] = max(scores[row, t], scores[row, t + HALF])
    width = HALF // 2
    while width > 0:
        for t in range(width):
            scratch[t] = max(scratch[t], scratch[t + width])
        width //= 2
    return scratch[0]


@njit(**INLINED)
def _total(scores, row, scratch):  # type: ignore[no-untyped-def]
    """Sum of a row of 64, by halving: vectorisable, and always in the same order."""
    for t in range(HALF):
        scratch[t] = scores[row, t] + scores[row, t + HALF]
    width = HALF // 2
    while width > 0:
        for t in range(width):
            scratch[t] += scratch[t + width]
        width //= 2
    return scratch[0]


@njit(**INLINED)
def _softmax_block(scores, row, num_keys, maxima, sums, outputs, scratch, dim):  # type: ignore[no-untyped-def]
    """Turns a row's scores of one block into weights and rescales what the row has gathered so far."""
    for t in range(num_keys, BLOCK_SIZE):
        scores[row, t] = _LOWEST
    highest = max(maxima[row], _largest(scores, row, scratch))
    rescale = exp(maxima[row] - highest)
    for t in range(BLOCK_SIZE):
        scores[row, t] = exp(scores[row, t] - highest)
    for t in range(num_keys, BLOCK_SIZE):
        scores[row, t] = np.float32(0.0)
    for d in range(dim):
        outputs[row, d] *= rescale
    maxima[row] = highest
    sums[row] = sums[row] * rescale + _total(scores, row, scratch)


@njit(**INLINED)
def _read_queries(q, first_token, kv_head, group, num_rows, scale, queries, dim):  # type: ignore[no-untyped-def]
    """The tile's query rows of one KV head: token by token, the heads of the group together; padding rows are zero."""
    for row in range(num_rows):
        for d in range(dim):
            queries[row, d] = load(q[first_token + row // group, kv_head * group + row % group, d]) * scale
    for row in range(num_rows, num_rows + ROW_GROUP - 1):
        for d in range(dim):
            queries[row, d] = np.float32(0.0)


@njit(**INLINED)
def _read_block(k_block, v_block, num_keys, keys, values, dim):  # type: ignore[no-untyped-def]
    for d in range(dim):
        for t in range(BLOCK_SIZE):
            keys[d, t] = load(k_block[d, t])
    for t in range(num_keys):
        for d in range(dim):
            values[t, d] = load(v_block[t, d])


@cache
def kernel_for(dim: int) -> Callable[..., None]:
    """The kernel for one head size: as a constant it lets the compiler keep rows in registers (1.7 times faster)."""

    @njit(**OPTIONS)
    def paged_attention(  # type: ignore[no-untyped-def]
        q,  # [T, H, D]
        k_pool,  # [N, Hk, D, 64]
        v_pool,  # [N, Hk, 64, D]
        block_tables,  # [B, most blocks] int32
        tile_rows,  # [tiles] which sequence
        tile_tokens,  # [tiles] first token of the tile in the step
        tile_sizes,  # [tiles] tokens in the tile
        positions,  # [T]
        scale,
        num_workers,
        out,  # [T, H, D]
    ):
        num_kv_heads = k_pool.shape[1]
        group = q.shape[1] // num_kv_heads
        most_rows = tile_sizes.max() * group + ROW_GROUP
        num_items = tile_rows.shape[0] * num_kv_heads
        for worker in prange(num_workers):
            queries = np.empty((most_rows, dim), np.float32)
            scores = np.empty((most_rows, BLOCK_SIZE), np.float32)
            outputs = np.empty((most_rows, dim), np.float32)
            maxima = np.empty(most_rows, np.float32)
            sums = np.empty(most_rows, np.float32)
            scratch = np.empty(HALF, np.float32)
            keys = np.empty((dim, BLOCK_SIZE), np.float32)
            values = np.empty((BLOCK_SIZE, dim), np.float32)
            # Dealt out one by one: neighbours cost about the same, so the workers end together.
            for item in range(worker, num_items, num_workers):
                tile, kv_head = item // num_kv_heads, item % num_kv_heads
                first_token, num_tokens = tile_tokens[tile], tile_sizes[tile]
                num_rows = num_tokens * group
                _read_queries(q, first_token, kv_head, group, num_rows, scale, queries, dim)
                outputs[:] = np.float32(0.0)
                maxima[:] = _LOWEST
                sums[:] = np.float32(0.0)
                last_position = positions[first_token + num_tokens - 1]
                for block in range(last_position // BLOCK_SIZE + 1):
                    block_id = block_tables[tile_rows[tile], block]
                    num_keys = min(BLOCK_SIZE, last_position + 1 - block * BLOCK_SIZE)
                    _read_block(k_pool[block_id, kv_head], v_pool[block_id, kv_head], num_keys, keys, values, dim)
                    for first in range(0, num_rows, ROW_GROUP):
                        _add_scores(queries, keys, scores, first, dim)
                        for row in range(first, first + ROW_GROUP):
                            position = positions[first_token + min(row, num_rows - 1) // group]
                            visible = min(BLOCK_SIZE, max(0, position + 1 - block * BLOCK_SIZE))
                            _softmax_block(scores, row, visible, maxima, sums, outputs, scratch, dim)
                        _add_values(scores, values, num_keys, outputs, first, dim)
                for row in range(num_rows):
                    token, head = first_token + row // group, kv_head * group + row % group
                    for d in range(dim):
                        out[token, head, d] = round_to(outputs[row, d] / sums[row], out[token, head, d])

    return cast(Callable[..., None], paged_attention)
