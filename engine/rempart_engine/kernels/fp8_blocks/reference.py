"""What fp8 values with block scales mean, and how they are made."""

import torch

from rempart_engine.kernels.fp8 import LARGEST, e4m3_bytes, power_of_two_scales


def dequantize_blocks(
    data: torch.Tensor,  # [R, C] float8_e4m3fn
    scales: torch.Tensor,  # [ceil(R / rows), ceil(C / columns)], one per block
    block: tuple[int, int],
) -> torch.Tensor:  # [R, C] float32
    """Value x scale of its block of rows x columns; the last blocks may be partial (DeepSeek-V3, README_WEIGHTS)."""
    rows, columns = block
    spread = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return data.float() * spread[: data.shape[0], : data.shape[1]]


def quantize_blocks(
    weight: torch.Tensor,  # [R, C]
    block: tuple[int, int],
    *,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as float8_e4m3fn [R, C] and float32 scales: each block's largest magnitude becomes 448.

    Args:
        power_of_two: round scales up to powers of two, as the format ue8m0 holds them.
    """
    rows, columns = block
    height, width = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [R', rows, C', columns]
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / LARGEST
    if power_of_two:
        scales = power_of_two_scales(scales)
    quantized = e4m3_bytes(blocks / scales[:, None, :, None]).view(torch.float8_e4m3fn)
    return quantized.flatten(2, 3).flatten(0, 1)[:height, :width].contiguous(), scales
