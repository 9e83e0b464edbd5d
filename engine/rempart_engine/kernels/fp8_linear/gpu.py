"""Linear layers on a GPU whose weights stay in fp8."""

import torch
from torch import nn

from rempart_engine.kernels.fp8_blocks import require_covered
from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks

_BLOCK = (128, 128)


class BlockFp8Linear(nn.Module):
    """y = x W^T with W as float8_e4m3fn and one scale per block, summed in float32 and rounded once.

    bfloat16 activations are rounded to e4m3, with a scale for each token's 128 channels, where the GPU multiplies e4m3
    (`reference.fp8_linear_quantized`); elsewhere, and in float32, they stay as they are and weights are decoded as they
    are read (`reference.fp8_linear`).

    Blocks are 128 x 128, as all published checkpoints have them. Weights of other blocks are decoded to float32 once,
    here, and multiplied in float32: that is for tests, and slow.
    """

    data: torch.Tensor  # [out, in] float8_e4m3fn; float32 if its blocks were others
    scales: torch.Tensor | None  # [ceil(out / 128), ceil(in / 128)] float32

    def __init__(self, data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        """Keeps data [out, in] and scales, which lie where the layer computes.

        Raises:
            ValueError: there is not one scale for each block.
        """
        super().__init__()
        require_covered(data, scales, block)
        self.out_features, self.in_features = data.shape
        is_kept = block == _BLOCK
        self.register_buffer("data", data.contiguous() if is_kept else dequantize_blocks(data, scales, block))
        self.register_buffer("scales", scales.float().contiguous() if is_kept else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] float32 or bfloat16 -> [T, out]
        """Rows of x may lie apart.

        Raises:
            ValueError: x is of another shape or type, or its columns lie apart.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"[T, {self.in_features}] in float32 or bfloat16 is taken, not {tuple(x.shape)} in {x.dtype}"
            )
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"a token's channels lie side by side, not with strides {x.stride()}")
        from rempart_engine.kernels.fp8_linear.kernel import multiply

        if self.scales is None:
            return multiply(x.float(), self.data, None).to(x.dtype)
        return multiply(x, self.data, self.scales)
