"""Residual add and RMS norm."""

import numpy as np
import torch

from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.rms_norm.cpu import add_rms_norm as _on_cpu
from rempart_engine.kernels.target import runs_triton


def add_rms_norm(
    residual: torch.Tensor,  # [T, W] float32, overwritten with residual + delta
    delta: torch.Tensor,  # [T, W]
    weight: torch.Tensor,  # [W] float32
    eps: float,
) -> torch.Tensor:  # [T, W], of delta's type
    """RMS norm of the new residual, which stays in float32 over the whole depth of the model.

    Raises:
        ValueError: shapes or types do not fit together, or the numbers of a row do not lie side by side.
    """
    if residual.shape != delta.shape or residual.dtype != torch.float32:
        raise ValueError(f"residual {tuple(residual.shape)} of {residual.dtype}, delta {tuple(delta.shape)}")
    _check(residual, weight)
    _check(delta, weight)
    if runs_triton(delta):
        from rempart_engine.kernels.rms_norm.kernel import add_rms_norm as on_gpu

        return on_gpu(residual, delta, weight, eps)
    out = torch.empty_like(delta)
    _on_cpu(residual.numpy(), as_array(delta), weight.numpy(), np.float32(eps), as_array(out))
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of x [T, W] alone, of its type; weight [W] float32. ValueError as above."""
    _check(x, weight)
    if runs_triton(x):
        from rempart_engine.kernels.rms_norm.kernel import add_rms_norm as on_gpu

        return on_gpu(None, x, weight, eps)
    return add_rms_norm(torch.zeros(x.shape), x, weight, eps)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:] or weight.dtype != torch.float32:
        raise ValueError(f"a matrix {tuple(x.shape)} does not fit weights {tuple(weight.shape)} of {weight.dtype}")
    if x.stride(1) != 1 or weight.stride(0) != 1:
        raise ValueError(f"numbers of a row do not lie side by side: strides {x.stride()}, {weight.stride()}")
