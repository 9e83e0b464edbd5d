"""The lightning indexer: a small attention whose only result is which tokens the large one sees."""

from collections.abc import Mapping

import torch
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.rope import Angles, rotate
from rempart_engine.kernels.select_tokens import Selection, select_tokens
from rempart_engine.kernels.store_latent_kv import IndexKeys
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.weights.weight import Weight

_LAYER_NORM_EPS = 1e-6


class Indexer(nn.Module):
    """Chooses tokens for one layer. Keys and head weights are kept from coarse number formats: the choice is sensitive.

    The reference also multiplies queries and keys by a Hadamard matrix. That changes no product, so it is left out.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        tensors: Mapping[str, Weight],
        parts: Parts,
        score_bytes: int,
    ) -> None:
        """Tensors are named as in the checkpoint, below `self_attn.indexer.`."""
        super().__init__()
        self._shape = config.indexer
        self._score_bytes = score_bytes
        self._dtype = parts.dtype
        self._weight_scale = (config.indexer.num_heads * config.indexer.head_dim) ** -0.5
        self.q = parts.linear(tensors["wq_b.weight"])
        self.k = parts.exact_linear(tensors["wk.weight"])
        self.head_weights = parts.wide_linear(tensors["weights_proj.weight"])
        self.register_buffer("norm_weight", tensors["k_norm.weight"].dequantized(torch.float32))
        self.register_buffer("norm_bias", tensors["k_norm.bias"].dequantized(torch.float32))

    def keys(self, x: torch.Tensor) -> IndexKeys:
        """What the layer caches of its input [T, W], to be stored before tokens are chosen."""
        return IndexKeys(self.k(x), self.norm_weight, self.norm_bias, _LAYER_NORM_EPS, self._shape.rope)

    def forward(
        self,
        x: torch.Tensor,  # [T, W]
        query_latents: torch.Tensor,  # [T, q_lora_rank], what the layer's queries are made from
        angles: Angles,
        pool: torch.Tensor,  # index cache of the layer
        step: StepInputs,
    ) -> Selection:
        layout, num_heads, dim = self._shape.rope, self._shape.num_heads, self._shape.head_dim
        if step.max_context <= self._shape.top_k:
            return Selection.of_everything(step)
        queries = rotate(self.q(query_latents).view(-1, num_heads, dim), angles, layout)
        weights = self.head_weights(x) * self._weight_scale
        return select_tokens(queries, weights, pool, step, self._shape.top_k, self._score_bytes)

    def compile_selection(self, pool: torch.Tensor) -> None:
        """Compile what only contexts beyond top_k need, so that no request waits for it. Reads block 0 of the pool."""
        positions, rows = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        nothing = torch.zeros(0, dtype=torch.int32)
        step = StepInputs(
            rows.long(), positions, rows, rows.long(), rows[None], nothing, nothing, nothing, rows.long(), 2
        )
        queries = torch.zeros(1, self._shape.num_heads, self._shape.head_dim, dtype=self._dtype)
        select_tokens(queries, torch.zeros(1, self._shape.num_heads), pool, step, 1, self._score_bytes)
