"""Activations as 8-bit integers with one scale per token."""

import torch

from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.quantize_rows.cpu import quantize_rows as _on_cpu


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as uint8 [T, K] around 128 and float32 scales [T]: x ~ (q - 128) * scale. ValueError unless x is 2-D."""
    if x.dim() != 2:
        raise ValueError(f"rows of a matrix are quantized, not of {tuple(x.shape)}")
    q, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0])
    _on_cpu(as_array(x), q.numpy(), scales.numpy())
    return q, scales
