"""Residual add and RMS norm: one program has a row in its registers, so that each number is read and written once."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import cast

_NUMBERS_A_THREAD = 16
"""Enough loads at a time for the memory, few enough registers for several programs on a multiprocessor."""


@triton.jit
def norm_factor(total, eps, WIDTH: tl.constexpr):
    """1 / sqrt(total / WIDTH + eps), each step rounded: the fast forms differ from GPU to GPU, and from a CPU's."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, WIDTH * 1.0) + eps))


@triton.jit
def _add_rms_norm(
    residual_ptr,  # [T, W] float32, or None
    delta_ptr,  # [T, W]
    weight_ptr,  # [W] float32
    out_ptr,  # [T, W], rows without gaps
    residual_stride,
    delta_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    is_inside = i < WIDTH
    number = tl.load(delta_ptr + row * delta_stride + i, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=is_inside, other=0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * residual_stride + i
        number += tl.load(residual_ptrs, mask=is_inside, other=0.0)
        tl.store(residual_ptrs, number, mask=is_inside)
    factor = norm_factor(tl.sum(number * number), eps, WIDTH)
    tl.store(out_ptr + row * WIDTH + i, cast(number * factor * weight, out_ptr.dtype.element_ty), mask=is_inside)


def add_rms_norm(
    residual: torch.Tensor | None,  # [T, W] float32, overwritten with residual + delta; None: all zeros
    delta: torch.Tensor,  # [T, W]
    weight: torch.Tensor,  # [W] float32
    eps: float,
) -> torch.Tensor:  # [T, W], of delta's type
    """RMS norm of the new residual; rows may lie apart, numbers of a row may not."""
    num_tokens, width = delta.shape
    out = delta.new_empty(num_tokens, width)
    residual_stride = 0 if residual is None else residual.stride(0)
    _add_rms_norm[(num_tokens,)](
        residual, delta, weight, out, residual_stride, delta.stride(0), eps, **_config(width), num_stages=1
    )
    return out


def _config(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(max(block // (32 * _NUMBERS_A_THREAD), 1), 16)}


def builds(target: Target) -> Iterator[Build]:
    """Residual streams of DeepSeek-V3.2 and Llama-3-8B, and DeepSeek's norm between the projections of queries."""
    for width, has_residual in ((7168, True), (4096, True), (1536, False)):
        constants = _config(width)
        num_warps = constants.pop("num_warps")
        pointers = {"residual_ptr": "*fp32"} if has_residual else {}
        pointers |= {"delta_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
        strides = {"residual_stride": "i32", "delta_stride": "i32"}
        yield Build(
            name=f"width {width}{', added to the residual' if has_residual else ''}",
            kernel=_add_rms_norm,
            arguments=pointers | strides | {"eps": "fp32"},
            constants=constants if has_residual else constants | {"residual_ptr": None},
            num_warps=num_warps,
            num_stages=1,
            aligned=frozenset(pointers | strides),
        )
