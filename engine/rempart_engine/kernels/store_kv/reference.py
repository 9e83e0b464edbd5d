"""What rotating and storing means, in plain torch."""

import torch

from rempart_engine.inputs import StepInputs


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding with the two halves of a head as pairs; heads [T, H, D], cos and sin [T, D/2]."""
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def rope_and_store_kv(
    qkv: torch.Tensor,  # [T, (H + 2 Hk) D]
    cos: torch.Tensor,  # [max positions, D/2]
    sin: torch.Tensor,
    step: StepInputs,
    k_pool: torch.Tensor,  # [N, Hk, D, 64]
    v_pool: torch.Tensor,  # [N, Hk, 64, D]
) -> torch.Tensor:  # [T, H, D]
    """Rotated queries; rotated keys and values are in the pools afterwards."""
    num_kv_heads, block_size, dim = v_pool.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    cos, sin = cos[step.positions.long()], sin[step.positions.long()]
    block, offset = step.slots.long() // block_size, step.slots.long() % block_size
    k_pool[block, :, :, offset] = rotate(k, cos, sin)
    v_pool[block, :, offset] = v
    return rotate(q, cos, sin)
