"""Weights in fp8 with one scale per block."""

import torch


def dequantize_blocks(
    data: torch.Tensor,  # [R, C] float8_e4m3fn
    scales: torch.Tensor,  # [ceil(R / rows), ceil(C / columns)]
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:  # [R, C]
    """The values in `dtype`, rounded once. Beside the result it needs memory for one row of blocks.

    Raises:
        ValueError: there is not one scale for each block.
    """
    rows, columns = block
    if scales.shape != (-(-data.shape[0] // rows), -(-data.shape[1] // columns)):
        raise ValueError(f"scales {tuple(scales.shape)} of blocks {block} do not cover {tuple(data.shape)}")
    out = torch.empty(data.shape, dtype=dtype)
    for values, row_scales, target in zip(data.split(rows), scales, out.split(rows), strict=True):
        spread = row_scales.float().repeat_interleave(columns)[: data.shape[1]]
        torch.mul(values.float(), spread, out=target) if dtype == torch.float32 else target.copy_(
            values.float() * spread
        )
    return out
