"""What a linear layer with fp8 weights means."""

import torch

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks
from rempart_engine.kernels.quantize_groups.reference import dequantize_groups, quantize_groups


def fp8_linear(
    x: torch.Tensor,  # [T, in]
    data: torch.Tensor,  # [out, in] float8_e4m3fn
    scales: torch.Tensor,  # [ceil(out / rows), ceil(in / columns)]
    block: tuple[int, int],
) -> torch.Tensor:  # [T, out], of x's type
    """x W^T with W = value x scale, multiplied and summed in float32, rounded once."""
    return (x.float() @ dequantize_blocks(data, scales, block).T).to(x.dtype)


def fp8_linear_quantized(
    x: torch.Tensor,  # [T, in]
    data: torch.Tensor,  # [out, in] float8_e4m3fn
    scales: torch.Tensor,  # [ceil(out / rows), ceil(in / columns)]
    block: tuple[int, int],
) -> torch.Tensor:  # [T, out], of x's type
    """As `fp8_linear`, with x rounded to e4m3 in groups of 128 channels first, as fp8 tensor cores take it."""
    return fp8_linear(dequantize_groups(*quantize_groups(x)), data, scales, block).to(x.dtype)
