"""Linear layers on weights as the checkpoint has them, by the library of the device: what a GPU multiplies fastest."""

import torch
from torch import nn


class DenseLinear(nn.Module):
    """y = x W^T (+ bias), computed in the weight's type, given in that of x."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Keeps weight [out, in], and bias [out] in the same type."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.to(weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, out]
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class WideLinear(nn.Module):
    """y = x W^T in float32, of x rounded to the weight's type: logits, whose differences bfloat16 would lose."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """Keeps weight [out, in], bfloat16 or float32."""
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, out] float32
        x = x.to(self.weight.dtype)
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return x.float() @ self.weight.float().t()
