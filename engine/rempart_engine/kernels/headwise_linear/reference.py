"""What a linear layer per head means."""

import torch


def headwise_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, H, K] by weight [H, K, N], every head by its own, in float32; [T, H, N]."""
    return torch.einsum("thk,hkn->thn", x.float(), weight.float()).to(x.dtype)
