"""Multi-head latent attention in its expanded form: keys and values of every head made from the latents.

For a piece of a prompt that sees all its tokens this takes less than a third of the absorbed form's arithmetic per
query and key (2 * (192 + 128) against 2 * (576 + 512) per head in DeepSeek-V3.2), but every latent must be expanded
first, once per piece. A sum's order depends on how a prompt is cut into pieces, so results differ in the last bits.
On a CPU it is the slower one (docs/adr/0007).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.latent_cache import read_latents
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.model.deepseek.config import DeepseekConfig


def whole_pieces(step: StepInputs, selection: Selection, least: int) -> Iterator[slice]:
    """The step's tokens of each sequence that has so many at least, and whose tokens all see everything before them."""
    counts = torch.bincount(step.token_rows).tolist()
    first = 0
    for count in counts:
        piece = slice(first, first + count)
        if count >= least and bool((selection.counts[piece] > step.positions[piece]).all()):
            yield piece
        first += count


def only(step: StepInputs, selection: Selection, tokens: torch.Tensor) -> tuple[StepInputs, Selection]:
    """Step and selection of the chosen tokens [T] bool alone, as far as absorbed attention reads them."""
    part = replace(step, positions=step.positions[tokens], token_rows=step.token_rows[tokens])
    return part, Selection(selection.positions[tokens], selection.counts[tokens])


class ExpandedAttention(nn.Module):
    """Attention of one sequence's new tokens over all its cached ones."""

    def __init__(self, config: DeepseekConfig, to_heads: torch.Tensor, scale: float) -> None:
        """`to_heads` [H * (nope + v), R] makes keys and values of all heads from a latent."""
        super().__init__()
        self._shape = config
        self._scale = scale
        self.register_buffer("to_heads", to_heads)

    def forward(
        self,
        queries: torch.Tensor,  # [n, H, nope + P], rotated
        pool: torch.Tensor,  # latent cache of the layer
        block_table: torch.Tensor,  # [blocks] int32, of the sequence
        num_tokens: int,
    ) -> torch.Tensor:  # [n, H, v]
        shape = self._shape
        places = torch.arange(num_tokens)
        slots = block_table.long()[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
        latents, rope_keys = (part.to(queries.dtype) for part in read_latents(pool, slots, shape.kv_lora_rank))
        heads = nn.functional.linear(latents, self.get_buffer("to_heads")).view(num_tokens, shape.num_heads, -1)
        plain, values = torch.split(heads, [shape.qk_nope_head_dim, shape.v_head_dim], dim=-1)
        keys = torch.cat((plain, rope_keys[:, None].expand(-1, shape.num_heads, -1)), dim=-1)
        is_visible = places <= torch.arange(num_tokens - len(queries), num_tokens)[:, None]
        q, k, v = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=is_visible, scale=self._scale)
        return attended[0].transpose(0, 1)
