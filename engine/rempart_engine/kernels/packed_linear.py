"""Linear layers whose weights are packed once into the layout that the matrix multiplication reads fastest."""

import torch
from torch import nn

_PACKING_ROWS = 64
"""Number of activation rows the packed layout is chosen for; it serves every other number as well."""


class PackedLinear(nn.Module):
    """y = x W^T (+ bias), oneDNN on a CPU.

    Rows of the result do not depend on the other rows of x: `tests/engine/test_batch_invariance.py` holds that.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKING_ROWS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, out]
        if x.shape[0] == 1:  # a single row takes another code path in oneDNN, which adds in another order
            return self._multiply(x.expand(2, -1).contiguous())[:1]
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


class WidePackedLinear(PackedLinear):
    """The same of float32 weights, for x of any float type: [T, in] -> [T, out] float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())
