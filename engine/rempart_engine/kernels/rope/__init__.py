"""Rotary position embedding of parts of heads, for both ways in which pairs can lie."""

from typing import Literal

import torch

RopeLayout = Literal["half-split", "interleaved"]
"""Pairs are (i, i + P/2), or (2i, 2i + 1)."""


def rotate(
    x: torch.Tensor,  # [T, H, P]
    cos: torch.Tensor,  # [T, P/2] float32, of each token's own position
    sin: torch.Tensor,
    layout: RopeLayout,
) -> torch.Tensor:  # [T, H, P], pairs where they were
    """Turn every pair by its angle, in float32."""
    values, cos, sin = x.float(), cos[:, None], sin[:, None]
    if layout == "half-split":
        first, second = values.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = values[..., 0::2], values[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return turned.to(x.dtype)
