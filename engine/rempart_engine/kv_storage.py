"""The memory behind the KV blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class PoolShape:
    """One pool of a model: what it keeps per layer and KV block."""

    name: str
    num_layers: int
    """Layers that have an entry, which need not be all layers of the model."""
    block_shape: tuple[int, ...]
    """Of one block of one layer."""
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all its layers."""
        return self.num_layers * prod(self.block_shape) * self.dtype.itemsize


class KVStorage:
    """All pools of a model, indexed by the same block ids.

    Blocks start as zeros, so that whatever a kernel reads beyond a sequence's end is finite.
    """

    def __init__(self, shapes: Sequence[PoolShape], num_blocks: int, device: torch.device = _CPU) -> None:
        self.num_blocks = num_blocks
        self._pools = {
            shape.name: torch.zeros(shape.num_layers, num_blocks, *shape.block_shape, dtype=shape.dtype, device=device)
            for shape in shapes
        }

    def layer(self, name: str, index: int) -> torch.Tensor:
        """The pool's blocks of one layer, [N, *block_shape]."""
        return self._pools[name][index]

    def export_blocks(self, block_ids: list[int]) -> dict[str, torch.Tensor]:
        """Copies of the given blocks, in their order: by pool, [L, n, *block_shape]."""
        return {name: pool[:, block_ids] for name, pool in self._pools.items()}

    def import_blocks(self, block_ids: list[int], blocks: Mapping[str, torch.Tensor]) -> None:
        """Write what `export_blocks` gave, here or on another engine, into the given blocks."""
        for name, pool in self._pools.items():
            pool[:, block_ids] = blocks[name]


def block_bytes(shapes: Sequence[PoolShape]) -> int:
    """Bytes of one KV block over all pools."""
    return sum(shape.block_bytes for shape in shapes)
