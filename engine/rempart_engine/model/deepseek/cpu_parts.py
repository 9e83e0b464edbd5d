"""Parts of models on a CPU: weights packed for oneDNN or for the kernels of this project."""

from dataclasses import dataclass

import torch
from torch import nn

from rempart_engine.kernels.fp8_linear import Fp8Linear
from rempart_engine.kernels.headwise_linear import HeadwiseLinear
from rempart_engine.kernels.packed_linear import PackedLinear, WidePackedLinear
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.moe import GatedMLP, SeparateExperts
from rempart_engine.model.deepseek.parts import ReadExpert
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.weight import Weight


@dataclass(frozen=True, slots=True)
class CpuParts:
    """Implements `Parts`."""

    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def linear(self, weight: Weight) -> nn.Module:
        if self.precision.keeps_fp8 and weight.scales is not None and weight.block is not None:
            return Fp8Linear(weight.data, weight.scales, weight.block)
        return self.precision.make_linear(weight.dequantized(self.dtype), None)

    def exact_linear(self, weight: Weight) -> nn.Module:
        return PackedLinear(weight.dequantized(self.dtype))

    def wide_linear(self, weight: Weight) -> nn.Module:
        return WidePackedLinear(weight.dequantized(torch.float32))

    def headwise_linear(self, weight: torch.Tensor) -> nn.Module:
        return HeadwiseLinear(weight)

    def experts(self, config: DeepseekConfig, read: ReadExpert) -> nn.Module:
        return SeparateExperts([GatedMLP(read(number), self) for number in range(config.moe.num_experts)])
