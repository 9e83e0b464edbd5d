"""Linear layers whose weights stay in fp8: a quarter of float32's bytes, numbers exactly as the checkpoint's."""

import torch
from torch import nn
from torch.nn.functional import pad

from rempart_engine.kernels.cpu_tiles import TILE_COLUMNS, TILE_ROWS
from rempart_engine.kernels.fp8_blocks import require_covered
from rempart_engine.kernels.fp8_linear.cpu import multiply


class Fp8Linear(nn.Module):
    """y = x W^T with W as float8_e4m3fn and one scale per block, multiplied and summed in float32.

    A sum's order is fixed, so rows of the result do not depend on the other rows of x.
    """

    packed: torch.Tensor  # [tiles, in, 32] e4m3 as uint8: outputs in tiles of 32, the last one filled with zeros
    scales: torch.Tensor  # [ceil(out / rows), ceil(in / columns)] float32

    def __init__(self, data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        """Keeps copies of data [out, in] and scales, for blocks of rows x columns.

        Raises:
            ValueError: there is not one scale for each block.
        """
        super().__init__()
        require_covered(data, scales, block)
        self.out_features, self.in_features = data.shape
        self._block = block
        tiles = pad(data.view(torch.uint8), (0, 0, 0, -self.out_features % TILE_COLUMNS)).unflatten(
            0, (-1, TILE_COLUMNS)
        )
        self.register_buffer("packed", tiles.transpose(1, 2).clone(memory_format=torch.contiguous_format))
        self.register_buffer("scales", scales.to(torch.float32, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, out]
        rows = pad(x.float(), (0, 0, 0, -x.shape[0] % TILE_ROWS)).contiguous()
        y = torch.empty(rows.shape[0], len(self.packed) * TILE_COLUMNS)
        multiply(rows.numpy(), self.packed.numpy(), self.scales.numpy(), *self._block, y.numpy())
        return y[: x.shape[0], : self.out_features].to(x.dtype)
