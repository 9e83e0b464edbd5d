"""Multi-head latent attention over the tokens that an indexer chose."""

from collections.abc import Mapping

import torch
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.latent_attention import latent_attention
from rempart_engine.kernels.rms_norm import rms_norm
from rempart_engine.kernels.rope import Angles, rotate_in_place
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kernels.store_latent_kv import store_latent_kv
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.expanded import ExpandedAttention, only, whole_pieces
from rempart_engine.model.deepseek.indexer import Indexer
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.deepseek.rotary import softmax_scale
from rempart_engine.model.weights.weight import Weight

_LATENT_NORM_EPS = 1e-6
"""Of the norms between low-rank projections, whatever the configuration says of the others."""


class LatentAttention(nn.Module):
    """Keys and values of all heads are one latent a token: k_h = W_UK_h c, v_h = W_UV_h c (DeepSeek-V2, section 2.1).

    W_UK goes to the queries and W_UV to the result, so that attention itself runs on the cached latents.
    """

    q_norm: torch.Tensor
    kv_norm: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        tensors: Mapping[str, Weight],
        parts: Parts,
        indexer: Indexer | None,
        expand_from: int | None = None,
    ) -> None:
        """Tensors are named as in the checkpoint, below `self_attn.`; without an indexer, a choice must be given."""
        super().__init__()
        self._shape = config
        self._scale = softmax_scale(config)
        self.indexer = indexer
        self.q_a = parts.linear(tensors["q_a_proj.weight"])
        self.q_b = parts.linear(tensors["q_b_proj.weight"])
        self.kv_a = parts.linear(tensors["kv_a_proj_with_mqa.weight"])
        self.o = parts.linear(tensors["o_proj.weight"])
        self.register_buffer("q_norm", tensors["q_a_layernorm.weight"].dequantized(torch.float32))
        self.register_buffer("kv_norm", tensors["kv_a_layernorm.weight"].dequantized(torch.float32))
        to_heads = tensors["kv_b_proj.weight"].dequantized(parts.dtype)
        of_heads = to_heads.view(config.num_heads, -1, config.kv_lora_rank)
        keys, values = torch.split(of_heads, [config.qk_nope_head_dim, config.v_head_dim], dim=1)  # [H, D, R] each
        self.query_to_latent = parts.headwise_linear(keys)
        self.latent_to_value = parts.headwise_linear(values.transpose(1, 2))
        self._expand_from = expand_from
        self.expanded = None if expand_from is None else ExpandedAttention(config, to_heads, self._scale)

    def forward(
        self,
        x: torch.Tensor,  # [T, W]
        angles: Angles,
        latent_pool: torch.Tensor,
        index_pool: torch.Tensor | None,
        step: StepInputs,
        selection: Selection | None,
    ) -> tuple[torch.Tensor, Selection]:  # [T, W]
        """What the layer adds, and the choice of tokens: its own indexer's, else the one given."""
        shape = self._shape
        query_latents = rms_norm(self.q_a(x), self.q_norm, _LATENT_NORM_EPS)
        queries = self.q_b(query_latents).view(len(x), shape.num_heads, -1)
        rotate_in_place(queries[..., shape.qk_nope_head_dim :], angles, "interleaved")
        keys = None if self.indexer is None else self.indexer.keys(x)
        store_latent_kv(self.kv_a(x), self.kv_norm, _LATENT_NORM_EPS, angles, step.slots, latent_pool, keys, index_pool)
        if self.indexer is not None:
            selection = self.indexer(x, query_latents, angles, index_pool, step)
        assert selection is not None, "the first layer has an indexer"
        return self.o(self._attend(queries, latent_pool, step, selection).flatten(1)), selection

    def _attend(
        self,
        queries: torch.Tensor,  # [T, H, nope + P]
        pool: torch.Tensor,
        step: StepInputs,
        selection: Selection,
    ) -> torch.Tensor:  # [T, H, v]
        """Expanded attention for pieces of prompts that are long enough, if it is wanted, absorbed for all others."""
        if self.expanded is None or self._expand_from is None:
            return self._absorbed(queries, pool, step, selection)
        attended = queries.new_empty(*queries.shape[:2], self._shape.v_head_dim)
        is_rest = torch.ones(len(queries), dtype=torch.bool)
        for piece in whole_pieces(step, selection, self._expand_from):
            table, last = step.block_tables[int(step.token_rows[piece.start])], int(step.positions[piece.stop - 1])
            attended[piece] = self.expanded(queries[piece], pool, table, last + 1)
            is_rest[piece] = False
        if is_rest.any():
            attended[is_rest] = self._absorbed(queries[is_rest], pool, *only(step, selection, is_rest))
        return attended

    def _absorbed(
        self, queries: torch.Tensor, pool: torch.Tensor, step: StepInputs, selection: Selection
    ) -> torch.Tensor:
        plain, turning = queries.tensor_split([self._shape.qk_nope_head_dim], dim=-1)
        attended = latent_attention(self.query_to_latent(plain), turning, pool, step, selection, self._scale)
        values: torch.Tensor = self.latent_to_value(attended)
        return values
