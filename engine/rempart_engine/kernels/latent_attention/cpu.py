"""Attention over latent records on a CPU: online softmax over 64 chosen tokens at a time, all heads of a group together.

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
from rempart_engine.kernels.cpu_tiles import TILE_COLUMNS, add_product_bfloat16, add_product_float32
from rempart_engine.kernels.latent_cache import GROUP, LatentLayout

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


@cache
def kernel_for(latent_dim: int, rope_dim: int, *, is_fp8: bool, in_bfloat16: bool) -> Callable[..., None]:
    """The kernel for one shape and format of records; `in_bfloat16` says how products are computed.

    Records of bfloat16 that are multiplied as such come as pairs; all others as what `load` reads.
    """
    add_product = add_product_bfloat16 if in_bfloat16 else add_product_float32
    per_element = 2 if in_bfloat16 else 1
    key_width = (latent_dim + rope_dim) // per_element
    latent_width = latent_dim // per_element
    out_width = -(-latent_dim // TILE_COLUMNS) * TILE_COLUMNS
    kind = np.uint32 if in_bfloat16 else np.float32
    layout = LatentLayout(latent_dim, rope_dim) if is_fp8 else None
    first_scale = latent_dim // 4
    first_rope = layout.rope_start // 2 if layout is not None else 0

    @njit(**INLINED)
    def read_record(record, scales, ropes, key):  # type: ignore[no-untyped-def]
        """One record as a row of keys: float32 numbers or pairs."""
        if not is_fp8:
            for d in range(key_width):
                key[d] = record[d] if in_bfloat16 else load(record[d])
        elif in_bfloat16:
            for start in range(0, latent_dim, GROUP):
                scale = scales[first_scale + start // GROUP]
                for d in range(start // 2, min(start + GROUP, latent_dim) // 2):
                    key[d] = bfloat16_pair(load(record[2 * d]) * scale, load(record[2 * d + 1]) * scale)
            for d in range(rope_dim // 2):
                low, high = ropes[first_rope + 2 * d], ropes[first_rope + 2 * d + 1]
                key[latent_width + d] = np.uint32(low) | (np.uint32(high) << np.uint32(16))
        else:
            for start in range(0, latent_dim, GROUP):
                scale = scales[first_scale + start // GROUP]
                for d in range(start, min(start + GROUP, latent_dim)):
                    key[d] = load(record[d]) * scale
            for d in range(rope_dim):
                key[latent_dim + d] = load(ropes[first_rope + d])

    @njit(**INLINED)
    def gather_latents(keys, latents):  # type: ignore[no-untyped-def]
        """The tile's latents as the right side of the second product.

        Pairs must be of two tokens now, not of two dimensions: even dimensions come first, then the odd ones.
        """
        for t in range(_TILE // 2):
            for d in range(latent_width):
                evens, odds = pair_halves(keys[2 * t, d], keys[2 * t + 1, d])
                latents[t, d] = evens
                latents[t, latent_width + d] = odds

    @njit(**INLINED)
    def weight_pairs(scores, pairs):  # type: ignore[no-untyped-def]
        for t in range(_TILE // 2):
            for h in range(scores.shape[1]):
                pairs[t, h] = bfloat16_pair(scores[2 * t, h], scores[2 * t + 1, h])

    @njit(**OPTIONS)
    def latent_attention(  # type: ignore[no-untyped-def]
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
                        position = first + t if sees_all else chosen[token, first + t]
                        block = block_tables[token_rows[token], position // BLOCK_SIZE]
                        offset = position % BLOCK_SIZE
                        read_record(records[block, offset], scales[block, offset], ropes[block, offset], keys[t])
                    for t in range(num_keys, _TILE):
                        keys[t, :] = kind(0)
                    scores[:] = np.float32(0.0)
                    add_product(keys, queries[token, head_group], scores)
                    _softmax_tile(scores, num_keys, scale, maxima, sums, factors)
                    for h in range(group):
                        for d in range(out_width):
                            gathered[h, d] *= factors[h]
                    if in_bfloat16:
                        gather_latents(keys, latents)
                        weight_pairs(scores, weights)
                        add_product(weights.T, latents, gathered)
                    else:
                        add_product(scores.T, keys, gathered)
                first_head = head_group * group
                for h in range(min(group, out.shape[1] - first_head)):
                    for d in range(latent_dim):
                        at = d // 2 + d % 2 * latent_width if in_bfloat16 else d
                        out[token, first_head + h, d] = round_to(gathered[h, at] / sums[h], out[token, 0, d])

    return cast(Callable[..., None], latent_attention)
