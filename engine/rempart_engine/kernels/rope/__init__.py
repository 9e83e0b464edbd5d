"""Rotary position embedding of parts of heads, for both ways in which pairs can lie."""

from typing import Literal

import torch

RopeLayout = Literal["half-split", "interleaved"]
"""Pairs are (i, i + P/2), or (2i, 2i + 1)."""

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [T, P/2] float32, of each token's own position."""


def rotate(x: torch.Tensor, angles: Angles, layout: RopeLayout) -> torch.Tensor:
    """Turn the first P dimensions of x [T, H, D] pair by pair, in float32; pairs stay where they are, in x's type."""
    cos, sin = (table[:, None] for table in angles)
    width = 2 * cos.shape[2]
    values = x[..., :width].float()
    if layout == "half-split":
        first, second = values.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = values[..., 0::2], values[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., width:]), dim=-1)
