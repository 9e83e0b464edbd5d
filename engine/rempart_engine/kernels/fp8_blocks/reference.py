"""What fp8 values with block scales mean, and how they are made."""

import torch

E4M3_MAX = 448.0
"""Largest finite number of float8_e4m3fn."""


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
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / E4M3_MAX
    if power_of_two:
        scales = scales.log2().ceil().exp2()
    quantized = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return quantized.flatten(2, 3).flatten(0, 1)[:height, :width].to(torch.float8_e4m3fn).contiguous(), scales
