"""Feed-forward: a gated MLP, and many of them of which each token takes a few."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rempart_engine.kernels.route_tokens import route_tokens
from rempart_engine.kernels.silu_mul import silu_mul
from rempart_engine.model.deepseek.config import MoEConfig
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.weights.weight import Weight


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense layer's feed-forward, or one expert."""

    def __init__(self, tensors: Mapping[str, Weight], parts: Parts) -> None:
        """Tensors: `gate_proj.weight`, `up_proj.weight` and `down_proj.weight`."""
        super().__init__()
        self.gate = parts.linear(tensors["gate_proj.weight"])
        self.up = parts.linear(tensors["up_proj.weight"])
        self.down = parts.linear(tensors["down_proj.weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, W] -> [T, W]
        added: torch.Tensor = self.down(silu_mul(torch.cat((self.gate(x), self.up(x)), dim=-1)))
        return added


class Router(nn.Module):
    """Which experts a token takes, and with what weight (DeepSeek-V3, section 2.1.2), in float32."""

    bias: torch.Tensor

    def __init__(self, config: MoEConfig, tensors: Mapping[str, Weight], parts: Parts) -> None:
        """Tensors: `weight` and `e_score_correction_bias`."""
        super().__init__()
        self._config = config
        self.gate = parts.wide_linear(tensors["weight"])
        self.register_buffer("bias", tensors["e_score_correction_bias"].dequantized(torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [T, W] -> [T, k] int64 and float32
        """Ids of each token's experts, ascending, and their weights. The bias chooses, and never weighs."""
        config = self._config
        return route_tokens(
            self.gate(x),
            self.bias,
            num_groups=config.num_groups,
            num_chosen_groups=config.num_chosen_groups,
            num_experts_per_token=config.num_experts_per_token,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )


class SeparateExperts(nn.Module):
    """Routed experts, each a module of its own: tokens are sorted by expert, so that each computes once."""

    def __init__(self, experts: Sequence[GatedMLP]) -> None:
        super().__init__()
        self.each = nn.ModuleList(experts)

    def forward(
        self,
        x: torch.Tensor,  # [T, W]
        experts: torch.Tensor,  # [T, k] int64, of each token
        weights: torch.Tensor,  # [T, k] float32
    ) -> torch.Tensor:  # [T, W] float32
        """Weighted sums; a token's is in the order of its experts."""
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self.each)).tolist()
        inputs = torch.split(x[order // experts.shape[1]], counts)
        outputs = [expert(part) for expert, part in zip(self.each, inputs, strict=True) if len(part)]
        routed = torch.empty(len(order), x.shape[1], dtype=x.dtype)
        routed[order] = torch.cat(outputs)
        weighted = routed.view(*experts.shape, -1).float() * weights[..., None]  # [T, k, W]
        return weighted.sum(1)


class MoE(nn.Module):
    """Experts that tokens are routed to, and shared ones that all tokens take."""

    def __init__(self, config: MoEConfig, tensors: Mapping[str, Weight], experts: nn.Module, parts: Parts) -> None:
        """Tensors are named as in the checkpoint, below `mlp.`, those of `experts` (see `Parts.experts`) excepted."""
        super().__init__()
        self.router = Router(config, below(tensors, "gate"), parts)
        self.experts = experts
        self.shared = GatedMLP(below(tensors, "shared_experts"), parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, W] -> [T, W]
        total: torch.Tensor = self.experts(x, *self.router(x)) + self.shared(x).float()
        return total.to(x.dtype)


def below(tensors: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Tensors whose names begin with `prefix.`, under the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
