"""The Llama family: grouped-query attention over a paged cache, gated feed-forward, pre-norm."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.paged_attention import paged_attention
from rempart_engine.kernels.rms_norm import add_rms_norm
from rempart_engine.kernels.silu_mul import silu_mul
from rempart_engine.kernels.store_kv import rope_and_store_kv
from rempart_engine.kv_storage import KVStorage, PoolShape
from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.rope import cos_sin_tables

Tensors = Mapping[str, torch.Tensor]
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]
"""From weight [out, in] and bias [out] to the layer that applies them."""


_KEYS = "keys"
_VALUES = "values"


class LlamaLayer(nn.Module):
    """One block. Its projections read the residual stream through a norm and give what is to be added to it."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor

    def __init__(self, config: LlamaConfig, tensors: Tensors, make_linear: MakeLinear) -> None:
        """Tensors are named as in the checkpoint, below `layers.{i}.`."""
        super().__init__()
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self.register_buffer("attention_norm", tensors["input_layernorm.weight"].float())
        self.register_buffer("mlp_norm", tensors["post_attention_layernorm.weight"].float())
        self.qkv = _fused(tensors, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), make_linear)
        self.o = _fused(tensors, ("self_attn.o_proj",), make_linear)
        self.gate_up = _fused(tensors, ("mlp.gate_proj", "mlp.up_proj"), make_linear)
        self.down = _fused(tensors, ("mlp.down_proj",), make_linear)

    def forward(
        self,
        residual: torch.Tensor,  # [T, W] float32, updated in place
        delta: torch.Tensor,  # [T, W], what the layer before adds
        angles: tuple[torch.Tensor, torch.Tensor],
        pools: tuple[torch.Tensor, torch.Tensor],
        step: StepInputs,
    ) -> torch.Tensor:  # [T, W], what this layer adds
        x = add_rms_norm(residual, delta, self.attention_norm, self._eps)
        q = rope_and_store_kv(self.qkv(x), *angles, step, *pools)
        attended = paged_attention(q, *pools, step, self._scale)
        x = add_rms_norm(residual, self.o(attended.flatten(1)), self.mlp_norm, self._eps)
        added: torch.Tensor = self.down(silu_mul(self.gate_up(x)))
        return added


class Llama(nn.Module):
    """Token ids of a step in, hidden states out; `logits` for those that need them."""

    embedding: torch.Tensor
    norm: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: LlamaConfig,
        layers: list[LlamaLayer],
        tensors: Tensors,
        make_linear: MakeLinear,
        max_model_len: int,
    ) -> None:
        """Tensors: `embed_tokens.weight`, `norm.weight`, and `lm_head.weight` unless it is tied to the embedding."""
        super().__init__()
        self._eps = config.rms_norm_eps
        self.layers = nn.ModuleList(layers)
        self.register_buffer("embedding", tensors["embed_tokens.weight"])
        self.register_buffer("norm", tensors["norm.weight"].float())
        self.head = make_linear(tensors.get("lm_head.weight", tensors["embed_tokens.weight"]), None)
        cos, sin = cos_sin_tables(config, max_model_len)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, step: StepInputs, storage: KVStorage) -> torch.Tensor:  # [T, W]
        delta = nn.functional.embedding(step.token_ids, self.embedding)
        residual = delta.new_zeros(delta.shape, dtype=torch.float32)
        for index, layer in enumerate(self.layers):
            pools = storage.layer(_KEYS, index), storage.layer(_VALUES, index)
            delta = layer(residual, delta, (self.cos, self.sin), pools, step)
        return add_rms_norm(residual, delta, self.norm, self._eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [O, W] -> [O, V]
        return self.head(hidden)  # type: ignore[no-any-return]  # nn.Module's call


def kv_pools(config: LlamaConfig, dtype: torch.dtype) -> tuple[PoolShape, PoolShape]:
    """What this model keeps per KV block. Keys lie transposed inside a block."""
    heads, dim = config.num_kv_heads, config.head_dim
    return (
        PoolShape(_KEYS, config.num_layers, (heads, dim, BLOCK_SIZE), dtype),
        PoolShape(_VALUES, config.num_layers, (heads, BLOCK_SIZE, dim), dtype),
    )


def _fused(tensors: Tensors, names: tuple[str, ...], make_linear: MakeLinear) -> nn.Module:
    """Projections of the same input, stacked into one."""
    biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
    weight = torch.cat([tensors[f"{name}.weight"] for name in names])
    return make_linear(weight, torch.cat(biases) if biases else None)
