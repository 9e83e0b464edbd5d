"""What the fused residual add and RMS norm mean."""

import torch


def add_rms_norm(
    residual: torch.Tensor,  # [T, W] float32, overwritten with residual + delta
    delta: torch.Tensor,  # [T, W]
    weight: torch.Tensor,  # [W] float32
    eps: float,
) -> torch.Tensor:  # [T, W], of delta's type
    """x / sqrt(mean(x^2) + eps) * weight of the new residual (Zhang and Sennrich 2019)."""
    residual += delta.float()
    return (residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps) * weight).to(delta.dtype)
