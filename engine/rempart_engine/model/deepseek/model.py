"""DeepSeek-V3.2 and its relatives: sparse latent attention and a mixture of experts, pre-norm."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.kernels.rms_norm import add_rms_norm
from rempart_engine.kernels.rope import Angles
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.attention import LatentAttention
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.indexer import Indexer
from rempart_engine.model.deepseek.kv_pools import INDEX_KEYS, LATENTS
from rempart_engine.model.deepseek.moe import GatedMLP, MoE, below
from rempart_engine.model.deepseek.rotary import cos_sin_tables
from rempart_engine.model.weights.weight import LinearFactory, Weight

DEFAULT_SCORE_BYTES = 64 << 20


class DeepseekLayer(nn.Module):
    """One block. Its halves read the residual stream through a norm and give what is to be added to it."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        index: int,
        tensors: Mapping[str, Weight],
        experts: Sequence[GatedMLP],
        make_linear: LinearFactory,
        dtype: torch.dtype,
        score_bytes: int = DEFAULT_SCORE_BYTES,
    ) -> None:
        """
        Args:
            index: of the layer; `num_layers` for the MTP layer.
            tensors: named as in the checkpoint, below `layers.{index}.`; the routed experts' are not needed.
            experts: the routed ones; none for a dense layer.
            dtype: of activations.
            score_bytes: most memory for index scores at a time.
        """
        super().__init__()
        self._eps = config.rms_norm_eps
        self._pool_index = index
        has_indexer = index == config.num_layers or config.indexer.is_full[index]
        self._index_pool_index = sum(config.indexer.is_full[:index]) if has_indexer else None
        attention = below(tensors, "self_attn")
        indexer = Indexer(config, below(attention, "indexer"), make_linear, dtype, score_bytes) if has_indexer else None
        self.attention = LatentAttention(config, attention, make_linear, dtype, indexer)
        self.mlp: nn.Module = (
            GatedMLP(below(tensors, "mlp"), make_linear)
            if index < config.num_dense_layers
            else MoE(config.moe, below(tensors, "mlp"), experts, make_linear)
        )
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


class Deepseek(nn.Module):
    """Token ids of a step in, hidden states out; `logits` for those that need them."""

    embedding: torch.Tensor
    norm: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        layers: Sequence[DeepseekLayer],
        tensors: Mapping[str, Weight],
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        """Tensors: `embed_tokens.weight`, `norm.weight` and `lm_head.weight`; the head computes in float32."""
        super().__init__()
        self._eps = config.rms_norm_eps
        self.layers = nn.ModuleList(layers)
        self.register_buffer("embedding", tensors["embed_tokens.weight"].dequantized(dtype))
        self.register_buffer("norm", tensors["norm.weight"].dequantized(torch.float32))
        self.head = PackedLinear(tensors["lm_head.weight"].dequantized(torch.float32))
        cos, sin = cos_sin_tables(config, max_model_len)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, step: StepInputs, storage: KVStorage) -> torch.Tensor:  # [T, W]
        delta = self.embed(step.token_ids)
        residual = torch.zeros(delta.shape)
        angles, selection = self.angles(step), None
        for layer in self.layers:
            delta, selection = layer(residual, delta, angles, storage, step, selection)
        return add_rms_norm(residual, delta, self.norm, self._eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [O, W] -> [O, V] float32
        return self.head(hidden.float())  # type: ignore[no-any-return]  # nn.Module's call

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:  # [T] -> [T, W]
        return nn.functional.embedding(token_ids, self.embedding)

    def angles(self, step: StepInputs) -> Angles:
        """cos and sin at the positions of the step's tokens."""
        return self.cos[step.positions], self.sin[step.positions]
