"""Causal attention over a paged KV cache with grouped query heads."""

import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.paged_attention.cpu import kernel_for
from rempart_engine.kernels.target import runs_triton


def paged_attention(
    q: torch.Tensor,  # [T, H, D], heads contiguous, other strides as they come
    k_pool: torch.Tensor,  # [N, Hk, D, 64]
    v_pool: torch.Tensor,  # [N, Hk, 64, D]
    step: StepInputs,
    scale: float,
) -> torch.Tensor:  # [T, H, D]
    """Attention of each new token over its sequence's cached tokens, its own included (its KV is stored already).

    Raises:
        ValueError: shapes, types or strides do not fit together.
    """
    num_tokens, num_heads, dim = q.shape
    num_kv_heads, block_size = k_pool.shape[1], k_pool.shape[3]
    if k_pool.shape[2] != dim or v_pool.shape[1:] != (num_kv_heads, block_size, dim):
        raise ValueError(f"pools {tuple(k_pool.shape)} and {tuple(v_pool.shape)} do not fit queries {tuple(q.shape)}")
    if num_heads % num_kv_heads or dim % 4 or block_size != 64:
        raise ValueError(f"{num_heads} heads over {num_kv_heads}, head size {dim}, block size {block_size}: not served")
    if not (q.dtype == k_pool.dtype == v_pool.dtype):
        raise ValueError(f"types differ: {q.dtype}, {k_pool.dtype}, {v_pool.dtype}")
    if q.stride(2) != 1 or not (k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError(
            f"strides {q.stride()}, {k_pool.stride()}, {v_pool.stride()}: heads and pools must be contiguous"
        )
    if runs_triton(q):
        from rempart_engine.kernels.paged_attention.kernel import paged_attention as on_gpu

        return on_gpu(q, k_pool, v_pool, step, scale)
    out = torch.empty(num_tokens, num_heads, dim, dtype=q.dtype)
    kernel_for(dim)(
        as_array(q),
        as_array(k_pool),
        as_array(v_pool),
        step.block_tables.numpy(),
        step.tile_rows.numpy(),
        step.tile_tokens.numpy(),
        step.tile_sizes.numpy(),
        step.positions.numpy(),
        scale,
        torch.get_num_threads(),
        as_array(out),
    )
    return out
