"""How products with stored weights are cut into tiles on a GPU."""

from dataclasses import dataclass
from typing import Literal

from rempart_engine.kernels.target import Target

Numbers = Literal["float32", "bfloat16", "fp8", "int8", "int4"]
"""In which weights are stored."""

_BITS = {"float32": 32, "bfloat16": 16, "fp8": 8, "int8": 8, "int4": 4}
_RESERVED = 12 * 1024
"""Bytes of shared memory that are left for the end of a kernel and for what Triton adds."""
_MOST_STAGES = 6
"""More than this, memory's latency is hidden: 5 blocks of 8 KB and more lie in flight on each multiprocessor."""

_MOST_SUMS_PER_THREAD = 64
"""A quarter of a thread's registers; beyond, eight warps share the tile."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program computes, and how."""

    rows: int
    """Outputs; a power of two."""
    tokens: int
    k: int
    """Inputs that are multiplied at a time; divides 128."""
    num_warps: int
    num_stages: int


def tiles_for(
    target: Target,
    numbers: Numbers,
    x_bytes: int,
    num_tokens: int,
    *,
    rows: int,
    num_matrices: int = 1,
    most_tokens: int,
    num_sums: int,
) -> Tiles:
    """Tiles that no token needs to fill: weights fill the tensor cores' rows.

    Args:
        x_bytes: of one activation: 4 (float32), 2 (bfloat16), 1 (e4m3).
        num_tokens: how many share a weight.
        rows: of weights in a tile, unless float32 asks for fewer: its products, which tests of parity alone need, are
            no work for tensor cores.
        num_matrices: whose same rows a tile holds.
        most_tokens: of a tile.
        num_sums: float32 numbers that are held for each place of the tile.
    """
    if x_bytes == 4 or numbers == "float32":
        return Tiles(rows=min(rows, 32), tokens=16, k=128 if numbers == "int4" else 32, num_warps=4, num_stages=2)
    tokens = min(max(16, 1 << (num_tokens - 1).bit_length()), most_tokens)
    # Decoding e4m3 by arithmetic takes the registers that another 64 inputs would.
    k = 64 if numbers in ("float32", "bfloat16") or (numbers == "fp8" and x_bytes == 2) else 128
    stage = num_matrices * rows * k * _BITS[numbers] // 8 + tokens * k * x_bytes
    num_stages = max(2, min((target.shared_bytes - _RESERVED) // stage, _MOST_STAGES))
    num_warps = 8 if rows * tokens * num_sums > 32 * 4 * _MOST_SUMS_PER_THREAD else 4
    return Tiles(rows, tokens, k, num_warps, num_stages)
