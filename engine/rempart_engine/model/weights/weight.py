"""One weight as its checkpoint holds it."""

from dataclasses import dataclass

import torch

from rempart_engine.kernels.fp8_blocks import dequantize_blocks


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """Floats, or fp8 values and the scales of their blocks."""

    data: torch.Tensor  # any shape; [out, in] float8_e4m3fn with scales
    scales: torch.Tensor | None = None  # [ceil(out / rows), ceil(in / columns)]
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale."""

    def __post_init__(self) -> None:
        if (self.scales is None) is not (self.block is None):
            raise ValueError("block scales and the size of their blocks come together")

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The values in `dtype`; the very tensor if they are floats of it already."""
        if self.scales is None or self.block is None:
            return self.data.to(dtype)
        return dequantize_blocks(self.data, self.scales, self.block, dtype)
