"""Parts of models on a GPU: matrices for its libraries, fp8 and routed experts for Triton's kernels."""

from dataclasses import dataclass

import torch
from torch import nn

from rempart_engine.kernels.dense_linear import DenseLinear, WideLinear
from rempart_engine.kernels.fp8_linear.gpu import BlockFp8Linear
from rempart_engine.kernels.headwise_linear import DenseHeadwiseLinear
from rempart_engine.kernels.moe import GroupedExperts
from rempart_engine.kernels.product_tiles import Numbers
from rempart_engine.model.deepseek.config import DeepseekConfig, Fp8Blocks
from rempart_engine.model.deepseek.parts import ReadExpert
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.weight import Weight


@dataclass(frozen=True, slots=True)
class GpuParts:
    """Implements `Parts`. A weight is on the device as soon as its part is made."""

    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    @property
    def device(self) -> torch.device:
        return self.precision.placement.device

    def linear(self, weight: Weight) -> nn.Module:
        if self.precision.keeps_fp8 and weight.scales is not None and weight.block is not None:
            return BlockFp8Linear(weight.data.to(self.device), weight.scales.to(self.device), weight.block)
        return self.exact_linear(weight)

    def exact_linear(self, weight: Weight) -> nn.Module:
        return DenseLinear(weight.dequantized(self.dtype).to(self.device))

    def wide_linear(self, weight: Weight) -> nn.Module:
        """With activations in bfloat16, products of a weight in bfloat16 are exact; wider ones stay as they are."""
        is_exact = weight.data.dtype == self.dtype == torch.bfloat16
        return WideLinear(weight.dequantized(self.dtype if is_exact else torch.float32).to(self.device))

    def headwise_linear(self, weight: torch.Tensor) -> nn.Module:
        return DenseHeadwiseLinear(weight.contiguous().to(self.device))

    def experts(self, config: DeepseekConfig, read: ReadExpert) -> nn.Module:
        moe = config.moe
        numbers = self._expert_numbers(config)
        experts = GroupedExperts(moe.num_experts, config.hidden_size, moe.intermediate_size, numbers, self.device)
        for number in range(moe.num_experts):
            weights = read(number)
            experts.write(number, *(weights[f"{name}_proj.weight"] for name in ("gate", "up", "down")))
        return experts

    def _expert_numbers(self, config: DeepseekConfig) -> Numbers:
        if self.precision.experts is not None:
            return self.precision.experts
        if self.precision.keeps_fp8 and config.fp8 == Fp8Blocks(128, 128):
            return "fp8"
        return "float32" if self.dtype == torch.float32 else "bfloat16"
