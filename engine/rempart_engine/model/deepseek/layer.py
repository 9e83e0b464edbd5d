"""One layer of a DeepSeek model: sparse latent attention and feed-forward, each behind a norm."""

from collections.abc import Mapping

import torch
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.rms_norm import add_rms_norm
from rempart_engine.kernels.rope import Angles
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.attention import LatentAttention
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.indexer import Indexer
from rempart_engine.model.deepseek.kv_pools import INDEX_KEYS, LATENTS
from rempart_engine.model.deepseek.moe import GatedMLP, MoE, below
from rempart_engine.model.deepseek.options import AttentionOptions
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.weights.weight import Weight


class DeepseekLayer(nn.Module):
    """One block. Its halves read the residual stream through a norm and give what is to be added to it."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        index: int,
        tensors: Mapping[str, Weight],
        experts: nn.Module | None,
        parts: Parts,
        options: AttentionOptions,
    ) -> None:
        """
        Args:
            index: of the layer; `num_layers` for the MTP layer.
            tensors: named as in the checkpoint, below `layers.{index}.`; the routed experts' are not needed.
            experts: the routed ones; None for a dense layer.
        """
        super().__init__()
        self._eps = config.rms_norm_eps
        self._pool_index = index
        has_indexer = index == config.num_layers or config.indexer.is_full[index]
        self._index_pool_index = sum(config.indexer.is_full[:index]) if has_indexer else None
        attention = below(tensors, "self_attn")
        indexer = Indexer(config, below(attention, "indexer"), parts, options.score_bytes) if has_indexer else None
        self.attention = LatentAttention(config, attention, parts, indexer, options.expand_from)
        mlp = below(tensors, "mlp")
        self.mlp: nn.Module = GatedMLP(mlp, parts) if experts is None else MoE(config.moe, mlp, experts, parts)
        self.register_buffer("attention_norm", tensors["input_layernorm.weight"].dequantized(torch.float32))
        self.register_buffer("mlp_norm", tensors["post_attention_layernorm.weight"].dequantized(torch.float32))

    def forward(
        self,
        residual: torch.Tensor,  # [T, W] float32, updated in place
        delta: torch.Tensor,  # [T, W], what the layer before adds
        angles: Angles,
        storage: KVStorage,
        step: StepInputs,
        selection: Selection | None,
    ) -> tuple[torch.Tensor, Selection]:  # [T, W]
        """What this layer adds, and the choice of tokens that a layer without an indexer takes over."""
        x = add_rms_norm(residual, delta, self.attention_norm, self._eps)
        latent_pool = storage.layer(LATENTS, self._pool_index)
        index_pool = None if self._index_pool_index is None else storage.layer(INDEX_KEYS, self._index_pool_index)
        attended, selection = self.attention(x, angles, latent_pool, index_pool, step, selection)
        return self.mlp(add_rms_norm(residual, attended, self.mlp_norm, self._eps)), selection
