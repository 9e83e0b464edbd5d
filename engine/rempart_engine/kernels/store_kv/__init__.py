"""Rotary embedding and the write of new keys and values into the paged cache."""

import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.store_kv.cpu import rope_and_store_kv as _on_cpu
from rempart_engine.kernels.target import runs_triton


def rope_and_store_kv(
    qkv: torch.Tensor,  # [T, (H + 2 Hk) D], overwritten
    cos: torch.Tensor,  # [max positions, D/2] float32
    sin: torch.Tensor,
    step: StepInputs,
    k_pool: torch.Tensor,  # [N, Hk, D, 64]
    v_pool: torch.Tensor,  # [N, Hk, 64, D]
) -> torch.Tensor:  # [T, H, D], a view of qkv
    """Rotated queries; rotated keys and values are in the pools afterwards. On a GPU, slot -1 stands for none.

    Raises:
        ValueError: shapes or types do not fit together, or a tensor has gaps.
    """
    num_kv_heads, dim = v_pool.shape[1], v_pool.shape[3]
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * dim or num_heads < 1 or cos.shape[1] * 2 != dim:
        raise ValueError(f"projection {tuple(qkv.shape)} does not fit pool {tuple(v_pool.shape)}")
    if qkv.dtype != k_pool.dtype:
        raise ValueError(f"types differ: {qkv.dtype}, {k_pool.dtype}")
    if k_pool.shape != (len(v_pool), num_kv_heads, dim, BLOCK_SIZE) or cos.shape != sin.shape:
        raise ValueError(f"pools {tuple(k_pool.shape)}, {tuple(v_pool.shape)}; angles {cos.shape}, {sin.shape}")
    if not all(tensor.is_contiguous() for tensor in (qkv, cos, sin, k_pool, v_pool)):
        raise ValueError("projection, angles and pools must be contiguous")
    if runs_triton(qkv):
        from rempart_engine.kernels.store_kv.kernel import rope_and_store_kv as on_gpu

        on_gpu(qkv, num_heads, cos, sin, step, k_pool, v_pool)
        return qkv.view(qkv.shape[0], -1, dim)[:, :num_heads]
    _on_cpu(
        as_array(qkv),
        num_heads,
        cos.numpy(),
        sin.numpy(),
        step.positions.numpy(),
        step.slots.numpy(),
        as_array(k_pool),
        as_array(v_pool),
    )
    return qkv.view(qkv.shape[0], -1, dim)[:, :num_heads]
