"""Rotary position embedding of parts of heads, for both ways in which pairs can lie."""

from typing import Literal

import torch

from rempart_engine.kernels.rope.reference import rotate as _on_cpu
from rempart_engine.kernels.target import runs_triton

RopeLayout = Literal["half-split", "interleaved"]
"""Pairs are (i, i + P/2), or (2i, 2i + 1)."""

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [T, P/2] float32, of each token's own position."""


def rotate(x: torch.Tensor, angles: Angles, layout: RopeLayout) -> torch.Tensor:
    """Turn the first P dimensions of x [T, H, D] pair by pair, in float32; pairs stay where they are, in x's type.

    Raises:
        ValueError: shapes do not fit together, or the numbers of a head do not lie side by side.
    """
    check_angles(x, angles)
    if runs_triton(x):
        from rempart_engine.kernels.rope.kernel import rotate as on_gpu

        return on_gpu(x, *angles, layout == "interleaved")
    return _on_cpu(x, *angles, layout == "interleaved")


def rotate_in_place(x: torch.Tensor, angles: Angles, layout: RopeLayout) -> None:
    """As `rotate`, written back to x."""
    check_angles(x, angles)
    if runs_triton(x):
        from rempart_engine.kernels.rope.kernel import rotate_in_place as on_gpu

        on_gpu(x, *angles, layout == "interleaved")
        return
    x.copy_(_on_cpu(x, *angles, layout == "interleaved"))


def check_angles(x: torch.Tensor, angles: Angles) -> None:
    """ValueError unless the angles are those of x [T, ..., D]."""
    for table in angles:
        if table.dim() != 2 or len(table) != len(x) or 2 * table.shape[1] > x.shape[-1]:
            raise ValueError(f"angles {tuple(table.shape)} are not of {tuple(x.shape)}")
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(f"angles are contiguous and float32, not {table.dtype} of strides {table.stride()}")
    if x.stride(-1) != 1:
        raise ValueError(f"numbers to turn do not lie side by side: strides {x.stride()}")
