"""Groups of activations to e4m3 in one pass over each token."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.quantize_groups.reference import GROUP
from rempart_engine.kernels.target import Target, target_of
from rempart_engine.kernels.triton_scalars import INTERPRETED, encode_e4m3, power_of_two_scale

_GROUPS_PER_PROGRAM = 16
"""4 KB of bfloat16: 16 channels a thread, in loads of 16 bytes."""
_NUM_WARPS = 4


@triton.jit
def quantized(x, axis: tl.constexpr, HAS_FP8: tl.constexpr):
    """A float32 tile, whose `axis` runs along the channels of one group, as e4m3 bytes and scales."""
    # What is no number has no part in the scale, and stays what it is.
    largest = tl.maximum(tl.max(tl.where(x == x, tl.abs(x), 0.0), axis), 1e-4)
    scale = power_of_two_scale(tl.div_rn(largest, 448.0))
    # The exact reciprocal of a power of two: its exponent mirrored.
    inverse = (0x7F000000 - scale.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return _encode(x * tl.expand_dims(inverse, axis), HAS_FP8), scale


@triton.jit
def _encode(x, HAS_FP8: tl.constexpr):
    if HAS_FP8 and not INTERPRETED:
        # Clamped by comparisons that a NaN fails, so that it stays one.
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return encode_e4m3(x)


@triton.jit
def _quantize(x, values, scales, width, num_groups, row_stride, HAS_FP8: tl.constexpr, GROUPS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    is_there = channel < width
    tile = tl.load(x + token * row_stride + channel, mask=is_there, other=0.0).to(tl.float32)
    bytes_, scale = quantized(tile, 1, HAS_FP8)
    tl.store(values + token * width + channel, bytes_, mask=is_there)
    tl.store(scales + token * num_groups + group, scale, mask=group < num_groups)


def quantize_groups(x: torch.Tensor, target: Target | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.quantize_groups.quantize_groups`, whose checks it relies on."""
    num_tokens, width = x.shape
    num_groups = -(-width // GROUP)
    values = x.new_empty((num_tokens, width), dtype=torch.uint8)
    scales = x.new_empty((num_tokens, num_groups), dtype=torch.float32)
    if x.numel():
        _quantize[(num_tokens, triton.cdiv(num_groups, _GROUPS_PER_PROGRAM))](
            x,
            values,
            scales,
            width,
            num_groups,
            x.stride(0),
            HAS_FP8=(target or target_of(x)).has_fp8,
            GROUPS=_GROUPS_PER_PROGRAM,
            num_warps=_NUM_WARPS,
        )
    return values, scales


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's activations; one kernel serves every width."""
    for dtype in ("bf16", "fp32"):
        yield Build(
            name=f"{dtype}",
            kernel=_quantize,
            arguments={
                "x": f"*{dtype}",
                "values": "*u8",
                "scales": "*fp32",
                "width": "i32",
                "num_groups": "i32",
                "row_stride": "i32",
            },
            constants={"HAS_FP8": target.has_fp8, "GROUPS": _GROUPS_PER_PROGRAM},
            num_warps=_NUM_WARPS,
            num_stages=1,
            aligned=frozenset({"x", "values", "scales", "width", "row_stride"}),
        )
