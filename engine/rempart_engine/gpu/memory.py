"""How much of a GPU's memory KV blocks may have."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of a GPU after its largest steps were tried with hardly any KV blocks."""

    total: int
    others: int
    """Taken by other processes, and by CUDA itself."""
    kept: int
    """Weights, rows, and all else that stays between steps."""
    step: int
    """What the largest step takes beside these at its peak."""


def bytes_for_blocks(use: MemoryUse, fraction: float, graphs: int) -> int:
    """What is left of `fraction` of the memory, with `graphs` bytes set aside; not less than 0."""
    return max(0, int(fraction * use.total) - use.others - use.kept - use.step - graphs)
