"""DeepSeek-V3.2 and its relatives: sparse latent attention and a mixture of experts, pre-norm."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.rms_norm import add_rms_norm
from rempart_engine.kernels.rope import Angles
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.kv_pools import INDEX_KEYS
from rempart_engine.model.deepseek.layer import DeepseekLayer
from rempart_engine.model.deepseek.mtp import MTP
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.deepseek.rotary import cos_sin_tables
from rempart_engine.model.weights.weight import Weight


class Deepseek(nn.Module):
    """Token ids of a step in, hidden states out; `logits` for those that need them."""

    mtp: MTP | None
    embedding: torch.Tensor
    norm: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        layers: Sequence[DeepseekLayer],
        tensors: Mapping[str, Weight],
        parts: Parts,
        max_model_len: int,
        mtp: MTP | None = None,
    ) -> None:
        """Tensors: `embed_tokens.weight`, `norm.weight` and `lm_head.weight`; the head computes in float32."""
        super().__init__()
        self._eps = config.rms_norm_eps
        self.layers = nn.ModuleList(layers)
        self.mtp = mtp
        self.register_buffer("embedding", tensors["embed_tokens.weight"].dequantized(parts.dtype))
        self.register_buffer("norm", tensors["norm.weight"].dequantized(torch.float32))
        self.head = parts.wide_linear(tensors["lm_head.weight"])
        cos, sin = cos_sin_tables(config, max_model_len)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.to(parts.device)

    def forward(self, step: StepInputs, storage: KVStorage) -> torch.Tensor:  # [T, W]
        delta = self._embed(step.token_ids)
        residual = delta.new_zeros(delta.shape, dtype=torch.float32)
        angles, selection = self._angles(step), None
        for layer in self.layers:
            delta, selection = layer(residual, delta, angles, storage, step, selection)
        return add_rms_norm(residual, delta, self.norm, self._eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [O, W] -> [O, V] float32
        return self.head(hidden)  # type: ignore[no-any-return]  # nn.Module's call

    def compile_selection(self, storage: KVStorage) -> None:
        """As `Indexer.compile_selection`; one layer's kernels are every layer's."""
        indexer = cast(DeepseekLayer, self.layers[0]).attention.indexer
        assert indexer is not None, "the first layer has an indexer"
        indexer.compile_selection(storage.layer(INDEX_KEYS, 0))

    def look_further(
        self,
        hidden: torch.Tensor,  # [T, W] of the step's tokens: from `forward`, or from this one layer earlier
        next_token_ids: torch.Tensor,  # [T] int64, the token after each
        step: StepInputs,
        storage: KVStorage,
    ) -> torch.Tensor:  # [T, W]
        """Hidden states whose logits are of the token after the next, by the MTP layer, which there must be."""
        assert self.mtp is not None, "there is no MTP layer"
        return self.mtp(self._embed(next_token_ids), hidden, self._angles(step), storage, step)  # type: ignore[no-any-return]

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:  # [T] -> [T, W]
        return nn.functional.embedding(token_ids, self.embedding)

    def _angles(self, step: StepInputs) -> Angles:
        """cos and sin at the positions of the step's tokens."""
        return self.cos[step.positions], self.sin[step.positions]
