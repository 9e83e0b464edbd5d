"""Logistic function whose bits do not depend on where in a tensor a number stands, as torch's do."""

import torch

from rempart_engine.kernels.sigmoid.cpu import sigmoid as _on_cpu


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e**-x) of a float32 matrix. ValueError for another type."""
    if x.dtype != torch.float32 or x.dim() != 2:
        raise ValueError(f"a float32 matrix is taken, not {x.dtype} {tuple(x.shape)}")
    if x.is_cuda:
        return torch.sigmoid(x)  # on a GPU every number is computed the same way
    out = torch.empty(x.shape)
    _on_cpu(x.contiguous().numpy(), out.numpy())
    return out
