"""Gated activation, a piece of a row per program."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import cast

_MOST_NUMBERS = 1024
"""Of one program: 16 bytes of bfloat16 for each of 128 threads, from either half."""


@triton.jit
def _silu_mul(
    gate_up_ptr,  # [T, 2 W]
    out_ptr,  # [T, W], rows without gaps
    stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = i < width
    gate_ptrs = gate_up_ptr + row * stride + i
    gate = tl.load(gate_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=is_inside, other=0.0).to(tl.float32)
    # Beyond 88 the exponential would overflow; the quotient is as good as 0 there.
    value = gate / (1.0 + tl.exp(tl.minimum(-gate, 88.0))) * up
    tl.store(out_ptr + row * width + i, cast(value, out_ptr.dtype.element_ty), mask=is_inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 W]; [T, W]. Rows may lie apart, numbers of a row may not."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    config = _config(width)
    grid = (num_tokens, triton.cdiv(width, config["BLOCK"]))
    _silu_mul[grid](gate_up, out, gate_up.stride(0), width, **config, num_stages=1)
    return out


def _config(width: int) -> dict[str, Any]:
    block = min(triton.next_power_of_2(width), _MOST_NUMBERS)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 4)}


def builds(target: Target) -> Iterator[Build]:
    """One build does for every width that is a multiple of 16 and no less than a program takes."""
    config = _config(_MOST_NUMBERS)
    yield Build(
        name="rows of any width",
        kernel=_silu_mul,
        arguments={"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride": "i32", "width": "i32"},
        constants={"BLOCK": config["BLOCK"]},
        num_warps=config["num_warps"],
        num_stages=1,
        aligned=frozenset(("gate_up_ptr", "out_ptr", "stride", "width")),
    )
