"""What attention over chosen latent records means, token by token, in float32."""

import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.latent_cache import read_latents
from rempart_engine.kernels.select_tokens import Selection


def latent_attention(
    latent_queries: torch.Tensor,  # [T, H, R]
    rope_queries: torch.Tensor,  # [T, H, P]
    pool: torch.Tensor,  # latent cache of the layer
    step: StepInputs,
    selection: Selection,
    scale: float,
) -> torch.Tensor:  # [T, H, R]
    """Softmax over the chosen tokens; the value of a token is its latent (DeepSeek-V2, section 2.1, absorbed)."""
    out = torch.empty_like(latent_queries)
    for token, position in enumerate(step.positions.tolist()):
        count = int(selection.counts[token])
        places = torch.arange(count) if count > position else selection.positions[token, :count].long()
        table = step.block_tables[int(step.token_rows[token])].long()
        latents, rope_keys = read_latents(pool, table[places // 64] * 64 + places % 64, latent_queries.shape[2])
        scores = latent_queries[token].float() @ latents.T + rope_queries[token].float() @ rope_keys.T
        out[token] = ((scores * scale).softmax(-1) @ latents).to(out.dtype)
    return out
