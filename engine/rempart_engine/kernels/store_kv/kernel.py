"""Rotation of queries and keys and the write of keys and values: each program has some heads of one token."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.rope.kernel import turned
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import cast

_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_NUMBERS = 1024
"""Turned by a program of 4 warps: 8 of Llama-3-8B's 40 heads of queries and keys, none of them left over."""


@triton.jit
def _rope_and_store_kv(
    qkv_ptr,  # [T, H + 2 KV_HEADS, DIM]
    cos_ptr,  # [max positions, DIM / 2]
    sin_ptr,
    positions_ptr,  # [T]
    slots_ptr,  # [T]
    k_pool_ptr,  # [N, KV_HEADS, DIM, 64]
    v_pool_ptr,  # [N, KV_HEADS, 64, DIM]
    token_stride,
    num_heads,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    slot = tl.load(slots_ptr + token)
    block, offset = slot // _BLOCK_SIZE, slot % _BLOCK_SIZE
    k_pool_ptr += block * KV_HEADS * DIM * _BLOCK_SIZE + offset
    v_pool_ptr += block * KV_HEADS * DIM * _BLOCK_SIZE + offset * DIM
    qkv_ptr += token * token_stride

    HALF: tl.constexpr = DIM // 2
    pair = tl.arange(0, HALF_BLOCK)
    angle = tl.load(positions_ptr + token).to(tl.int64) * HALF + pair
    cos = tl.load(cos_ptr + angle, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < HALF, other=0.0)[None, :]
    head = (first_head + tl.arange(0, HEADS))[:, None, None]
    dim = (pair[:, None] + tl.arange(0, 2)[None, :] * HALF)[None]
    is_pair = (head < num_heads + KV_HEADS) & (pair < HALF)[None, :, None]
    pairs = tl.load(qkv_ptr + head * DIM + dim, mask=is_pair, other=0.0).to(tl.float32)
    tl.debug_barrier()  # a number that two threads hold is read by both before one writes
    result = cast(turned(pairs, cos, sin), qkv_ptr.dtype.element_ty)
    tl.store(qkv_ptr + head * DIM + dim, result, mask=is_pair & (head < num_heads))
    if slot >= 0:
        keys_ptr = k_pool_ptr + (head - num_heads) * (DIM * _BLOCK_SIZE)
        tl.store(keys_ptr + dim * _BLOCK_SIZE, result, mask=is_pair & (head >= num_heads))
        if first_head < KV_HEADS:
            is_value = is_pair & (head < KV_HEADS)
            values = tl.load(qkv_ptr + (num_heads + KV_HEADS + head) * DIM + dim, mask=is_value)
            tl.store(v_pool_ptr + head * (_BLOCK_SIZE * DIM) + dim, values, mask=is_value)


def rope_and_store_kv(
    qkv: torch.Tensor,  # [T, (H + 2 Hk) D], queries are overwritten
    num_heads: int,
    cos: torch.Tensor,  # [max positions, D/2]
    sin: torch.Tensor,
    step: StepInputs,
    k_pool: torch.Tensor,  # [N, Hk, D, 64]
    v_pool: torch.Tensor,  # [N, Hk, 64, D]
) -> None:
    """Rotated queries are in qkv afterwards, rotated keys and values in the pools; nothing is stored for slot -1."""
    num_kv_heads, dim = v_pool.shape[1], v_pool.shape[3]
    config = _config(num_kv_heads, dim)
    grid = (len(qkv), triton.cdiv(num_heads + num_kv_heads, config["HEADS"]))
    _rope_and_store_kv[grid](
        qkv,
        cos,
        sin,
        step.positions,
        step.slots,
        k_pool,
        v_pool,
        qkv.stride(0),
        num_heads,
        **config,
        num_warps=4,
        num_stages=1,
    )


def _config(num_kv_heads: int, dim: int) -> dict[str, Any]:
    half_block = triton.next_power_of_2(dim // 2)
    return {
        "KV_HEADS": num_kv_heads,
        "DIM": dim,
        "HEADS": max(_NUMBERS // (2 * half_block), 1),
        "HALF_BLOCK": half_block,
    }


def builds(target: Target) -> Iterator[Build]:
    """Llama-3-8B."""
    pointers = {name: "*bf16" for name in ("qkv_ptr", "k_pool_ptr", "v_pool_ptr")}
    pointers |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i32", "slots_ptr": "*i64"}
    yield Build(
        name="32 heads over 8",
        kernel=_rope_and_store_kv,
        arguments=pointers | {"token_stride": "i32", "num_heads": "i32"},
        constants=_config(8, 128),
        num_warps=4,
        num_stages=1,
        aligned=frozenset((*pointers, "token_stride", "num_heads")),
    )
