"""Tensors in the layouts that the tile products read."""

from typing import Any

import numpy as np
import torch


def as_pairs(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as bfloat16, neighbours along K in one int32: [..., K/2]."""
    return x.bfloat16().contiguous().view(torch.int32)


def columns_of_heads(x: torch.Tensor, group: int, *, in_pairs: bool) -> np.ndarray[Any, Any]:
    """x [T, H, D] as [T, groups, D, group] float32, or as [T, groups, D/2, group] uint32 pairs of bfloat16.

    Heads become neighbours, in groups of `group`; missing ones are zeros.
    """
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % group)).unflatten(1, (-1, group))
    values = as_pairs(padded) if in_pairs else padded.float()
    array = values.transpose(2, 3).contiguous().numpy()
    return array.view(np.uint32) if in_pairs else array
