"""What a linear layer with fp8 weights means."""

import torch

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks


def fp8_linear(
    x: torch.Tensor,  # [T, in]
    data: torch.Tensor,  # [out, in] float8_e4m3fn
    scales: torch.Tensor,  # [ceil(out / rows), ceil(in / columns)]
    block: tuple[int, int],
) -> torch.Tensor:  # [T, out], of x's type
    """x W^T with W = value x scale, multiplied and summed in float32, rounded once."""
    return (x.float() @ dequantize_blocks(data, scales, block).T).to(x.dtype)
