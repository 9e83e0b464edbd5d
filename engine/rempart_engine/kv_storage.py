"""The memory behind the KV blocks."""

from dataclasses import dataclass

import torch

from rempart_engine.config import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one KV block holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BLOCK_SIZE * self.dtype.itemsize


class KVStorage:
    """Key and value pools of all layers, indexed by the same block ids. Keys lie transposed inside a block.

    Blocks start as zeros, so that whatever a kernel reads beyond a sequence's end is finite.
    """

    def __init__(self, shape: KVShape, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        size = (shape.num_layers, num_blocks, shape.num_kv_heads)
        self._keys = torch.zeros(*size, shape.head_dim, BLOCK_SIZE, dtype=shape.dtype)
        self._values = torch.zeros(*size, BLOCK_SIZE, shape.head_dim, dtype=shape.dtype)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools of one layer: keys [N, Hk, D, 64] and values [N, Hk, 64, D]."""
        return self._keys[index], self._values[index]

    def export_blocks(self, block_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the given blocks, in their order: [L, n, Hk, D, 64] and [L, n, Hk, 64, D]."""
        return self._keys[:, block_ids], self._values[:, block_ids]

    def import_blocks(self, block_ids: list[int], blocks: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write what `export_blocks` gave, here or on another engine, into the given blocks."""
        self._keys[:, block_ids], self._values[:, block_ids] = blocks
