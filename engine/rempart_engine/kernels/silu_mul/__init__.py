"""Gated activation of the feed-forward block."""

import torch

from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.silu_mul.cpu import silu_mul as _on_cpu


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 W] (gate first); [T, W]. ValueError when the width is odd."""
    num_tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate and up together have odd width {width}")
    out = torch.empty(num_tokens, width // 2, dtype=gate_up.dtype)
    _on_cpu(as_array(gate_up), as_array(out))
    return out
