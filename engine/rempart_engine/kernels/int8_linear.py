"""Linear layers in 8-bit integers: half the bytes of bfloat16, twice its arithmetic, and sums that are exact."""

import torch
from torch import nn

from rempart_engine.kernels.quantize_rows import quantize_rows
from rempart_engine.kernels.quantize_rows.reference import ZERO_POINT


class Int8Linear(nn.Module):
    """y = x W^T (+ bias) with W as int8 and one scale per output, x quantized per token as it comes (W8A8), oneDNN.

    Integer sums are exact, so a row of the result cannot depend on the other rows of x.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        weight = weight.float()
        scales = (weight.abs().amax(-1) / 127.0).clamp(min=torch.finfo(torch.float32).tiny)
        q = (weight / scales[:, None]).round().to(torch.int8)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(q, None))
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int32))
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, out]
        q, row_scales = quantize_rows(x)
        product = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, ZERO_POINT, self.packed, self.scales, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = torch.empty(product.shape, dtype=x.dtype)
        if self.bias is None:
            return torch.mul(product, row_scales[:, None], out=y)
        return torch.addcmul(self.bias, product, row_scales[:, None]).to(x.dtype)
