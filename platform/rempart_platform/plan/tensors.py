"""The tensors of a checkpoint, in groups of equal ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a tensor belongs to."""

    ROUTED_EXPERTS = "routed experts"
    OTHER = "other layers"
    """Attention, indexer, shared experts, dense layers, router, norms."""
    EMBEDDING = "embedding"
    HEAD = "head"


class Precision(StrEnum):
    """How narrow a tensor may be stored."""

    BULK = "bulk"
    """A linear layer that 4 bits are tried on: routed experts, or all linear layers of a model that has none."""
    LINEAR = "linear"
    """A linear layer that 8 bits are enough for."""
    BF16 = "bf16"
    F32 = "f32"


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """`count` tensors of [rows, columns]; a vector has one row."""

    part: Part
    precision: Precision
    rows: int
    columns: int
    count: int = 1
    is_split: bool = True
    """Tensor-parallel ranks share it out; otherwise each of them holds it whole."""
    is_mtp: bool = False
    """Of the multi-token-prediction layers, which serving may leave out."""

    @property
    def is_linear(self) -> bool:
        return self.precision in (Precision.BULK, Precision.LINEAR)

    @property
    def num_params(self) -> int:
        return self.rows * self.columns * self.count


Choice = Callable[[TensorGroup], bool]


def num_params(groups: Iterable[TensorGroup], choice: Choice = lambda group: True) -> int:
    """Parameters of the chosen groups."""
    return sum(group.num_params for group in groups if choice(group))
