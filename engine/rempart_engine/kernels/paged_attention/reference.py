"""What paged attention means, row by row, in float32."""

import torch

from rempart_engine.inputs import StepInputs


def paged_attention(
    q: torch.Tensor,  # [T, H, D]
    k_pool: torch.Tensor,  # [N, Hk, D, 64]
    v_pool: torch.Tensor,  # [N, Hk, 64, D]
    step: StepInputs,
    scale: float,
) -> torch.Tensor:  # [T, H, D]
    """Causal attention of each new token over its sequence's cached tokens, its own included."""
    group = q.shape[1] // k_pool.shape[1]
    out = torch.empty_like(q)
    for tile in range(step.tile_rows.shape[0]):
        first = int(step.tile_tokens[tile])
        tokens = slice(first, first + int(step.tile_sizes[tile]))
        positions = step.positions[tokens]
        num_blocks = int(positions[-1]) // k_pool.shape[3] + 1
        blocks = step.block_tables[int(step.tile_rows[tile]), :num_blocks].long()
        keys = k_pool[blocks].permute(1, 0, 3, 2).flatten(1, 2).float().repeat_interleave(group, 0)  # [H, S, D]
        values = v_pool[blocks].permute(1, 0, 2, 3).flatten(1, 2).float().repeat_interleave(group, 0)
        scores = torch.einsum("thd,hsd->hts", q[tokens].float() * scale, keys)
        hidden = torch.arange(keys.shape[1])[None, :] > positions[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("hts,hsd->thd", weights, values.masked_fill(~values.isfinite(), 0.0)).to(q.dtype)
    return out
