"""Residual add and RMS norm."""

import numpy as np
import torch

from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.rms_norm.cpu import add_rms_norm as _on_cpu


def add_rms_norm(
    residual: torch.Tensor,  # [T, W] float32, overwritten with residual + delta
    delta: torch.Tensor,  # [T, W]
    weight: torch.Tensor,  # [W] float32
    eps: float,
) -> torch.Tensor:  # [T, W], of delta's type
    """RMS norm of the new residual, which stays in float32 over the whole depth of the model.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    if residual.shape != delta.shape or weight.shape != residual.shape[1:] or residual.dtype != torch.float32:
        raise ValueError(f"residual {tuple(residual.shape)}, delta {tuple(delta.shape)}, weight {tuple(weight.shape)}")
    out = torch.empty_like(delta)
    _on_cpu(residual.numpy(), as_array(delta), weight.numpy(), np.float32(eps), as_array(out))
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of x [T, W] alone, of its type; weight [W] float32. ValueError as above."""
    return add_rms_norm(torch.zeros(x.shape), x, weight, eps)
