"""What quantizing groups of channels means."""

import torch

from rempart_engine.kernels.fp8 import LARGEST, e4m3_bytes, power_of_two_scales

GROUP = 128
"""Channels that share a scale."""
SMALLEST = 1e-4
"""Magnitude below which scales shrink no further."""


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as e4m3 bytes [T, K] and scales [T, ceil(K / 128)], as DeepSeek-V3.2's reference quantizes activations.

    amax = max(|x|, 1e-4); scale = 2**ceil(log2(amax / 448)); value = clamp(x / scale, +-448). The last group may be
    partial.
    """
    width = x.shape[1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))  # [T, G, 128]
    scales = power_of_two_scales(groups.abs().amax(-1).clamp(min=SMALLEST) / LARGEST)
    return e4m3_bytes(groups / scales[..., None]).flatten(1)[:, :width].contiguous(), scales


def dequantize_groups(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:  # [T, K], [T, G] -> [T, K] float32
    """value x scale of its group."""
    spread = scales.repeat_interleave(GROUP, 1)[:, : values.shape[1]]
    return values.view(torch.float8_e4m3fn).float() * spread
