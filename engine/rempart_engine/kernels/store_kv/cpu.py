"""Rotary embedding of new queries and keys, and the write of keys and values through the slot mapping, in one pass."""

from numba import njit, prange

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.cpu_scalars import OPTIONS, load, round_to


@njit(**OPTIONS)
def rope_and_store_kv(  # type: ignore[no-untyped-def]
    qkv,  # [T, (H + 2 Hk) D], rotated queries are written back in place
    num_heads,
    cos,  # [max positions, D/2] float32
    sin,
    positions,  # [T]
    slots,  # [T]
    k_pool,  # [N, Hk, D, 64]
    v_pool,  # [N, Hk, 64, D]
):
    num_kv_heads, dim = v_pool.shape[1], v_pool.shape[3]
    half = dim // 2
    for token in prange(qkv.shape[0]):
        position = positions[token]
        block, offset = slots[token] // BLOCK_SIZE, slots[token] % BLOCK_SIZE
        for head in range(num_heads + num_kv_heads):
            base = head * dim
            for d in range(half):
                first, second = load(qkv[token, base + d]), load(qkv[token, base + half + d])
                c, s = cos[position, d], sin[position, d]
                low, high = first * c - second * s, second * c + first * s
                if head < num_heads:
                    qkv[token, base + d] = round_to(low, qkv[token, base + d])
                    qkv[token, base + half + d] = round_to(high, qkv[token, base + d])
                else:
                    k_pool[block, head - num_heads, d, offset] = round_to(low, qkv[token, base + d])
                    k_pool[block, head - num_heads, half + d, offset] = round_to(high, qkv[token, base + d])
        values = (num_heads + num_kv_heads) * dim
        for head in range(num_kv_heads):
            for d in range(dim):
                v_pool[block, head, offset, d] = qkv[token, values + head * dim + d]
