"""Weights in fp8 with one scale per block."""

import torch

from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.fp8_blocks.cpu import dequantize_blocks as _on_cpu


def dequantize_blocks(
    data: torch.Tensor,  # [R, C] float8_e4m3fn
    scales: torch.Tensor,  # [ceil(R / rows), ceil(C / columns)]
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:  # [R, C]
    """The values as float32 or bfloat16, rounded once; no memory but the result's is used.

    Raises:
        ValueError: there is not one scale for each block.
    """
    require_covered(data, scales, block)
    out = torch.empty(data.shape, dtype=dtype)
    _on_cpu(data.contiguous().view(torch.uint8).numpy(), scales.float().numpy(), *block, as_array(out))
    return out


def require_covered(data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
    """Raises ValueError unless data is fp8 with one scale for each block of rows x columns."""
    rows, columns = block
    if data.dtype != torch.float8_e4m3fn:
        raise ValueError(f"blocks of {data.dtype} have no scales")
    if scales.shape != (-(-data.shape[0] // rows), -(-data.shape[1] // columns)):
        raise ValueError(f"scales {tuple(scales.shape)} of blocks {block} do not cover {tuple(data.shape)}")
