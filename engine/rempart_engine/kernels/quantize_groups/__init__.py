"""Activations in e4m3 with one scale for each token's 128 channels, as DeepSeek's fp8 products take them."""

import torch

from rempart_engine.kernels.quantize_groups.reference import quantize_groups as _reference
from rempart_engine.kernels.target import runs_triton


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as e4m3 bytes (uint8) [T, K] and float32 scales [T, ceil(K / 128)]: x ~ value * scale.

    x is float32 or bfloat16; its rows may lie apart, its columns may not.

    Raises:
        ValueError: x is not such a matrix.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a float32 or bfloat16 matrix is quantized, not {x.dtype} {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"a token's channels lie side by side, not with strides {x.stride()}")
    if not runs_triton(x):
        return _reference(x)
    from rempart_engine.kernels.quantize_groups.kernel import quantize_groups as on_gpu

    return on_gpu(x)
