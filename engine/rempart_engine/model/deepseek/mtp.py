"""Multi-token prediction: one more layer that guesses the token after the next (DeepSeek-V3, section 2.2)."""

from collections.abc import Mapping

import torch
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.rms_norm import add_rms_norm, rms_norm
from rempart_engine.kernels.rope import Angles
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.layer import DeepseekLayer
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.weights.weight import Weight


class MTP(nn.Module):
    """Shares embedding, angles and head with its model; has KV of its own in the same blocks."""

    embedding_norm: torch.Tensor
    hidden_norm: torch.Tensor
    head_norm: torch.Tensor

    def __init__(
        self,
        config: DeepseekConfig,
        tensors: Mapping[str, Weight],
        layer: DeepseekLayer,
        parts: Parts,
    ) -> None:
        """Tensors: `enorm.weight`, `hnorm.weight`, `eh_proj.weight` and `shared_head.norm.weight`."""
        super().__init__()
        self._eps = config.rms_norm_eps
        self.layer = layer
        self.join = parts.exact_linear(tensors["eh_proj.weight"])
        self.register_buffer("embedding_norm", tensors["enorm.weight"].dequantized(torch.float32))
        self.register_buffer("hidden_norm", tensors["hnorm.weight"].dequantized(torch.float32))
        self.register_buffer("head_norm", tensors["shared_head.norm.weight"].dequantized(torch.float32))

    def forward(
        self,
        embedded: torch.Tensor,  # [T, W] of the token after each of the step's
        hidden: torch.Tensor,  # [T, W] of the step's tokens: the model's, or this layer's own from the pass before
        angles: Angles,
        storage: KVStorage,
        step: StepInputs,
    ) -> torch.Tensor:  # [T, W]
        """Hidden states, ready for the head. Position 0 was trained without an embedding."""
        embedded = embedded.masked_fill((step.positions == 0)[:, None], 0.0)
        delta = self.join(
            torch.cat(
                (rms_norm(embedded, self.embedding_norm, self._eps), rms_norm(hidden, self.hidden_norm, self._eps)), -1
            )
        )
        residual = delta.new_zeros(delta.shape, dtype=torch.float32)
        delta, _ = self.layer(residual, delta, angles, storage, step, None)
        return add_rms_norm(residual, delta, self.head_norm, self._eps)
