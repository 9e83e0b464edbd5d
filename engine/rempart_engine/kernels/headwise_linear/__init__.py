"""A linear layer for each head: how MLA moves queries into the latent space, and results out of it."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from rempart_engine.kernels.cpu_tiles import TILE_COLUMNS, TILE_ROWS, has_bfloat16_dot
from rempart_engine.kernels.headwise_linear.cpu import kernel_for
from rempart_engine.kernels.packing import as_pairs


class HeadwiseLinear(nn.Module):
    """y[t, h] = x[t, h] @ weight[h]. A sum's order is fixed, so rows of the result do not depend on other rows of x."""

    packed: torch.Tensor  # [H, K, N] float32, or [H, K/2, N] int32 pairs along K; N filled up to a multiple of 32

    def __init__(self, weight: torch.Tensor) -> None:
        """Packs weight [H, K, N]; bfloat16 stays that where the CPU multiplies it."""
        super().__init__()
        _, width, self.out_features = weight.shape
        self._in_bfloat16 = has_bfloat16_dot() and weight.dtype == torch.bfloat16 and width % 2 == 0
        filled = pad(weight, (0, -self.out_features % TILE_COLUMNS))
        if self._in_bfloat16:
            packed = as_pairs(filled.transpose(1, 2)).transpose(1, 2).contiguous()
        else:
            packed = filled.float().contiguous()
        self.register_buffer("packed", packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, H, K] -> [T, H, N] of the same type
        rows = pad(x, (0, 0, 0, 0, 0, -x.shape[0] % TILE_ROWS))
        y = torch.empty(rows.shape[0], rows.shape[1], self.packed.shape[2])
        kernel = kernel_for(in_bfloat16=self._in_bfloat16)
        if self._in_bfloat16:
            kernel(as_pairs(rows).numpy().view(np.uint32), self.packed.numpy().view(np.uint32), y.numpy())
        else:
            kernel(rows.float().contiguous().numpy(), self.packed.numpy(), y.numpy())
        return y[: x.shape[0], :, : self.out_features].to(x.dtype)


class DenseHeadwiseLinear(nn.Module):
    """The same on the weight as it is, by the library of the device: what a GPU multiplies fastest."""

    weight: torch.Tensor  # [H, K, N]

    def __init__(self, weight: torch.Tensor) -> None:
        """Keeps weight [H, K, N], in the type that x will have."""
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, H, K], of any strides -> [T, H, N] contiguous
        num_heads, _, width = self.weight.shape
        y = x.new_empty(x.shape[0], num_heads, width)
        torch.bmm(x.transpose(0, 1), self.weight, out=y.transpose(0, 1))  # written in place: no copy of x or y
        return y
