"""Attention over latent records on a CPU: online softmax over 64 chosen tokens at a time, a group of heads together.

All heads share the records, so a tile of 64 is read once for a group of heads that lie side by side in vector lanes:

    scores [64, G] = keys [64, R + P] @ queries [R + P, G]      output [G, R] += weights [G, 64] @ latents [64, R]

Each head's result is a fixed sequence of operations over its own chosen tokens, whatever else is in the step.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
from numba import njit, prange

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.cpu_scalars import INLINED, OPTIONS, bfloat16_pair, exp, load, pair_halves, round_to
from rempart_engine.kernels.cpu_tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    add_product_bfloat16,
    add_product_float32,
    fetch_rows,
)
from rempart_engine.kernels.latent_cache import GROUP

_TILE = 64
"""Chosen tokens that are worked on together."""
_LOWEST = np.float32(-1e30)
"""Below every score, and still finite, so that differences are."""


@njit(**INLINED)
def _softmax_tile(scores, num_keys, scale, maxima, sums, factors):  # type: ignore[no-untyped-def]
    """Turns a tile's scores into weights; `factors` are what each head has gathered so far must be multiplied by."""
    num_heads = maxima.shape[0]
    for h in range(num_heads):
        factors[h] = maxima[h]
    for t in range(num_keys):
        for h in range(num_heads):
            scores[t, h] *= scale
            maxima[h] = max(maxima[h], scores[t, h])
    for h in range(num_heads):
        factors[h] = exp(factors[h] - maxima[h])
        sums[h] *= factors[h]
    for t in range(num_keys):
        for h in range(num_heads):
            weight = exp(scores[t, h] - maxima[h])
            scores[t, h] = weight
            sums[h] += weight
    for t in range(num_keys, _TILE):
        for h in range(num_heads):
            scores[t, h] = np.float32(0.0)


@njit(**INLINED)
def _read_plain(record, width, key):  # type: ignore[no-untyped-def]
    for d in range(width):
        key[d] = load(record[d])


@njit(**INLINED)
def _read_fp8(record, scales, ropes, latent_dim, rope_dim, key):  # type: ignore[no-untyped-def]
    """An fp8 record, with its float32 and its uint16 view, as float32 numbers."""
    num_groups = -(-latent_dim // GROUP)
    for group in range(num_groups):
        scale = scales[latent_dim // 4 + group]
        for d in range(group * GROUP, min((group + 1) * GROUP, latent_dim)):
            key[d] = load(record[d]) * scale
    first_rope = latent_dim // 2 + 2 * num_groups
    for d in range(rope_dim):
        key[latent_dim + d] = load(ropes[first_rope + d])


@njit(**INLINED)
def _read_fp8_in_pairs(record, scales, ropes, latent_dim, rope_dim, key):  # type: ignore[no-untyped-def]
    """The same as pairs of bfloat16, to which latents round."""
    num_groups = -(-latent_dim // GROUP)
    for group in range(num_groups):
        scale = scales[latent_dim // 4 + group]
        for d in range(group * GROUP // 2, min((group + 1) * GROUP, latent_dim) // 2):
            key[d] = bfloat16_pair(load(record[2 * d]) * scale, load(record[2 * d + 1]) * scale)
    first_rope = latent_dim // 2 + 2 * num_groups
    for d in range(rope_dim // 2):
        low, high = ropes[first_rope + 2 * d], ropes[first_rope + 2 * d + 1]
        key[latent_dim // 2 + d] = np.uint32(low) | (np.uint32(high) << np.uint32(16))


@njit(**INLINED)
def _pair_tokens(keys, latent_width, latents):  # type: ignore[no-untyped-def]
    """The tile's latents as the right side of the second product, whose pairs are of two tokens, not two dimensions.

    Even dimensions come first, then the odd ones.
    """
    for t in range(_TILE // 2):
        for d in range(latent_width):
            evens, odds = pair_halves(keys[2 * t, d], keys[2 * t + 1, d])
            latents[t, d] = evens
            latents[t, latent_width + d] = odds


@njit(**INLINED)
def _pair_weights(scores, weights):  # type: ignore[no-untyped-def]
    for t in range(_TILE // 2):
        for h in range(scores.shape[1]):
            weights[t, h] = bfloat16_pair(scores[2 * t, h], scores[2 * t + 1, h])


@njit(**INLINED)
def _write(gathered, sums, is_paired, out):  # type: ignore[no-untyped-def]
    """Results [H, R] of heads from what they gathered; `is_paired`: even dimensions first, then the odd ones."""
    num_heads, dim = out.shape
    for h in range(num_heads):
        for d in range(dim):
            at = d // 2 + d % 2 * (dim // 2) if is_paired else d
            out[h, d] = round_to(gathered[h, at] / sums[h], out[h, d])


@njit(**INLINED)
def _place(number, sees_all, chosen, block_table):  # type: ignore[no-untyped-def]
    """Block and offset of the number-th token that is seen."""
    position = number if sees_all else chosen[number]
    return block_table[position // BLOCK_SIZE], position % BLOCK_SIZE


@cache
def kernel_for(latent_dim: int, rope_dim: int, *, is_fp8: bool, in_bfloat16: bool) -> Callable[..., None]:  # noqa: C901 -- which format is decided when it is compiled
    """The kernel for one shape and format of records; `in_bfloat16` says how products are computed.

    Records of bfloat16 that are multiplied as such come as pairs; all others as what `load` reads.
    """
    per_element = 2 if in_bfloat16 else 1
    key_width = (latent_dim + rope_dim) // per_element
    latent_width = latent_dim // per_element
    out_width = -(-latent_dim // TILE_COLUMNS) * TILE_COLUMNS
    kind = np.uint32 if in_bfloat16 else np.float32

    @njit(**OPTIONS)
    def latent_attention(  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912 -- formats are branches
        queries,  # [T, groups, R + P, G] float32, or [T, groups, (R + P)/2, G] pairs
        records,  # [N, 64, R + P] elements or pairs, or fp8 records' bytes
        scales,  # [N, 64, ...] float32 view of the fp8 records
        ropes,  # [N, 64, ...] uint16 view of the fp8 records
        block_tables,  # [B, most blocks] int32
        token_rows,  # [T] int32
        positions,  # [T] int32
        chosen,  # [T, K] int32
        counts,  # [T] int32
        scale,
        num_workers,
        out,  # [T, H, R]
    ):
        num_groups, group = queries.shape[1], queries.shape[3]
        for worker in prange(num_workers):
            keys = np.zeros((_TILE, max(key_width, out_width)), kind)
            latents = np.zeros((_TILE // per_element, out_width), kind)
            scores = np.empty((_TILE, group), np.float32)
            weights = np.empty((_TILE // per_element, group), kind)
            maxima = np.empty(group, np.float32)
            sums = np.empty(group, np.float32)
            factors = np.empty(group, np.float32)
            gathered = np.empty((group, out_width), np.float32)
            for item in range(worker, queries.shape[0] * num_groups, num_workers):
                token, head_group = item // num_groups, item % num_groups
                sees_all = counts[token] > positions[token]
                maxima[:] = _LOWEST
                sums[:] = np.float32(0.0)
                gathered[:] = np.float32(0.0)
                for first in range(0, counts[token], _TILE):
                    num_keys = min(_TILE, counts[token] - first)
                    for t in range(num_keys):
                        block, offset = _place(first + t, sees_all, chosen[token], block_tables[token_rows[token]])
                        ahead = min(first + _TILE + t, counts[token] - 1)
                        next_block, next_offset = _place(
                            ahead, sees_all, chosen[token], block_tables[token_rows[token]]
                        )
                        fetch_rows(records[next_block, next_offset], 0, TILE_ROWS)  # type: ignore[call-arg]  # numba
                        record = records[block, offset]
                        if is_fp8 and in_bfloat16:
                            _read_fp8_in_pairs(
                                record, scales[block, offset], ropes[block, offset], latent_dim, rope_dim, keys[t]
                            )
                        elif is_fp8:
                            _read_fp8(
                                record, scales[block, offset], ropes[block, offset], latent_dim, rope_dim, keys[t]
                            )
                        else:
                            _read_plain(record, key_width, keys[t])
                    for t in range(num_keys, _TILE):
                        keys[t, :] = kind(0)
                    scores[:] = np.float32(0.0)
                    if in_bfloat16:
                        add_product_bfloat16(keys, queries[token, head_group], scores)
                    else:
                        add_product_float32(keys, queries[token, head_group], scores)
                    _softmax_tile(scores, num_keys, scale, maxima, sums, factors)
                    for h in range(group):
                        for d in range(out_width):
                            gathered[h, d] *= factors[h]
                    if in_bfloat16:
                        _pair_tokens(keys, latent_width, latents)
                        _pair_weights(scores, weights)
                        add_product_bfloat16(weights.T, latents, gathered)
                    else:
                        add_product_float32(scores.T, keys, gathered)
                first_head = head_group * group
                _write(gathered, sums, in_bfloat16, out[token, first_head : first_head + group])

    return cast(Callable[..., None], latent_attention)
