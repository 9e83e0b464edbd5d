"""What the layers of a model are made of, which differs from device to device."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.weights.weight import Weight

ReadExpert = Callable[[int], Mapping[str, Weight]]
"""The weights `gate_proj.weight`, `up_proj.weight` and `down_proj.weight` of a routed expert, read when asked for."""


class Parts(Protocol):
    """Makes modules that hold weights where they are computed. Each forgets the weight that it was made from."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        ...

    @property
    def device(self) -> torch.device: ...

    def linear(self, weight: Weight) -> nn.Module:
        """[T, in] -> [T, out], with the weight in the numbers that were chosen for the model."""
        ...

    def exact_linear(self, weight: Weight) -> nn.Module:
        """The same with the weight in the activations' type, for what is sensitive to coarser numbers."""
        ...

    def wide_linear(self, weight: Weight) -> nn.Module:
        """[T, in] of any float type -> [T, out] float32, multiplied without loss and summed in float32."""
        ...

    def headwise_linear(self, weight: torch.Tensor) -> nn.Module:
        """[T, H, in] -> [T, H, out] by weight [H, in, out] of the activations' type."""
        ...

    def experts(self, config: DeepseekConfig, read: ReadExpert) -> nn.Module:
        """x [T, W], experts [T, k] int64, weights [T, k] float32 -> weighted sums [T, W] float32."""
        ...
