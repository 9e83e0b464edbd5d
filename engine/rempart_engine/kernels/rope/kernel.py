"""Rotation of heads: each program turns the pairs of some heads of one token."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import cast

_NUMBERS = 2048
"""Turned by a program of 4 warps, 16 to a thread: one token's 128 heads of 64 make 4 programs."""


@triton.jit
def turned(pairs, cos, sin):
    """Pairs [..., 2] turned by angles; float32."""
    first, second = tl.split(pairs)
    return tl.join(first * cos - second * sin, second * cos + first * sin)


@triton.jit
def _rotate(
    x_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D], may be x
    cos_ptr,  # [T, HALF]
    sin_ptr,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    num_heads,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    PAIR_STEP: tl.constexpr,  # from one pair to the next
    MEMBER_STEP: tl.constexpr,  # from the first of a pair to the second
    IN_PLACE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    x_ptr += token * token_stride
    out_ptr += token * out_token_stride
    pair = tl.arange(0, HALF_BLOCK)
    cos = tl.load(cos_ptr + token * HALF + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + pair, mask=pair < HALF, other=0.0)
    dim = pair[:, None] * PAIR_STEP + tl.arange(0, 2)[None, :] * MEMBER_STEP
    is_pair = (head < num_heads)[:, None, None] & (pair < HALF)[None, :, None]
    pairs = tl.load(x_ptr + head[:, None, None] * head_stride + dim[None], mask=is_pair, other=0.0).to(tl.float32)
    if IN_PLACE:
        tl.debug_barrier()  # a number that two threads hold is read by both before one writes
    result = cast(turned(pairs, cos[None, :], sin[None, :]), out_ptr.dtype.element_ty)
    tl.store(out_ptr + head[:, None, None] * out_head_stride + dim[None], result, mask=is_pair)
    if DIM > 2 * HALF and not IN_PLACE:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)
        is_rest = (head < num_heads)[:, None] & (rest < DIM)[None, :]
        numbers = tl.load(x_ptr + head[:, None] * head_stride + rest[None, :], mask=is_rest)
        tl.store(out_ptr + head[:, None] * out_head_stride + rest[None, :], numbers, mask=is_rest)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """x [T, H, D] of any strides but the last, turned by angles [T, P/2]; [T, H, D] without gaps."""
    out = x.new_empty(x.shape)
    _launch(x, out, cos, sin, is_interleaved)
    return out


def rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> None:
    """x [T, H, D] of any strides but the last, turned by angles [T, P/2]."""
    _launch(x, x, cos, sin, is_interleaved)


def _launch(x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> None:
    num_tokens, num_heads, dim = x.shape
    config = _config(num_heads, dim, cos.shape[1], is_interleaved, in_place=out is x)
    grid = (num_tokens, triton.cdiv(num_heads, config["HEADS"]))
    strides = (*x.stride()[:2], *out.stride()[:2])
    _rotate[grid](x, out, cos, sin, *strides, num_heads, **config, num_warps=4, num_stages=1)


def _config(num_heads: int, dim: int, half: int, is_interleaved: bool, in_place: bool) -> dict[str, Any]:
    half_block = triton.next_power_of_2(half)
    return {
        "HALF": half,
        "DIM": dim,
        "PAIR_STEP": 2 if is_interleaved else 1,
        "MEMBER_STEP": 1 if is_interleaved else half,
        "IN_PLACE": in_place,
        "HEADS": max(min(triton.next_power_of_2(num_heads), _NUMBERS // (2 * half_block)), 1),
        "HALF_BLOCK": half_block,
        "REST_BLOCK": triton.next_power_of_2(max(dim - 2 * half, 1)),
    }


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's queries in place, for 1 to 8 GPUs, and the queries of both kinds of indexers."""
    shapes = {f"{heads} heads in place": (heads, 64, True, True) for heads in (128, 64, 32, 16)}
    shapes |= {
        f"index queries, {name}": (64, 128, name == "interleaved", False) for name in ("half-split", "interleaved")
    }
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    numbers = ("token_stride", "head_stride", "out_token_stride", "out_head_stride", "num_heads")
    for name, (num_heads, dim, is_interleaved, in_place) in shapes.items():
        yield Build(
            name=name,
            kernel=_rotate,
            arguments=pointers | dict.fromkeys(numbers, "i32"),
            constants=_config(num_heads, dim, 32, is_interleaved, in_place),
            num_warps=4,
            num_stages=1,
            aligned=frozenset((*pointers, *numbers)),
        )
