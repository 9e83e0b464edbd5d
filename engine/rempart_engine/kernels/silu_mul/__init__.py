"""Gated activation of the feed-forward block."""

import torch

from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.silu_mul.cpu import silu_mul as _on_cpu
from rempart_engine.kernels.target import runs_triton


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 W] (gate first); [T, W]. ValueError for an odd width, or numbers of a row apart."""
    num_tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate and up together have odd width {width}")
    if gate_up.stride(1) != 1:
        raise ValueError(f"numbers of a row do not lie side by side: strides {gate_up.stride()}")
    if runs_triton(gate_up):
        from rempart_engine.kernels.silu_mul.kernel import silu_mul as on_gpu

        return on_gpu(gate_up)
    out = torch.empty(num_tokens, width // 2, dtype=gate_up.dtype)
    _on_cpu(as_array(gate_up), as_array(out))
    return out
