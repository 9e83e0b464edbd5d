"""Feed-forward: a gated MLP, and many of them of which each token takes a few."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.kernels.sigmoid import sigmoid
from rempart_engine.kernels.silu_mul import silu_mul
from rempart_engine.model.deepseek.config import MoEConfig
from rempart_engine.model.weights.weight import LinearFactory, Weight


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense layer's feed-forward, or one expert."""

    def __init__(self, tensors: Mapping[str, Weight], make_linear: LinearFactory) -> None:
        """Tensors: `gate_proj.weight`, `up_proj.weight` and `down_proj.weight`."""
        super().__init__()
        self.gate = make_linear(tensors["gate_proj.weight"])
        self.up = make_linear(tensors["up_proj.weight"])
        self.down = make_linear(tensors["down_proj.weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, W] -> [T, W]
        added: torch.Tensor = self.down(silu_mul(torch.cat((self.gate(x), self.up(x)), dim=-1)))
        return added


class Router(nn.Module):
    """Which experts a token takes, and with what weight (DeepSeek-V3, section 2.1.2), in float32."""

    bias: torch.Tensor

    def __init__(self, config: MoEConfig, tensors: Mapping[str, Weight]) -> None:
        """Tensors: `weight` and `e_score_correction_bias`."""
        super().__init__()
        self._config = config
        self.gate = PackedLinear(tensors["weight"].dequantized(torch.float32))
        self.register_buffer("bias", tensors["e_score_correction_bias"].dequantized(torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [T, W] -> [T, k] int64 and float32
        """Ids of each token's experts, ascending, and their weights. The bias chooses, and never weighs."""
        config = self._config
        scores = sigmoid(self.gate(x.float()))
        ranked = (scores + self.bias).view(len(x), config.num_groups, -1)
        group_scores = ranked.topk(min(2, ranked.shape[2]), dim=-1).values.sum(-1)
        chosen_groups = group_scores.topk(config.num_chosen_groups, dim=-1).indices
        is_hidden = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen_groups, False)
        ranked = ranked.masked_fill(is_hidden[..., None], -torch.inf).flatten(1)
        experts = ranked.topk(config.num_experts_per_token, dim=-1).indices.sort(dim=-1).values
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class MoE(nn.Module):
    """Experts that tokens are routed to, and shared ones that all tokens take."""

    def __init__(
        self,
        config: MoEConfig,
        tensors: Mapping[str, Weight],
        experts: Sequence[GatedMLP],
        make_linear: LinearFactory,
    ) -> None:
        """Tensors are named as in the checkpoint, below `mlp.`, those of `experts` excepted."""
        super().__init__()
        self.router = Router(config, below(tensors, "gate"))
        self.experts = nn.ModuleList(experts)
        self.shared = GatedMLP(below(tensors, "shared_experts"), make_linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, W] -> [T, W]
        """Tokens are sorted by expert, so that each computes once; a token's sum is in the order of expert ids."""
        experts, weights = self.router(x)
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        inputs = torch.split(x[order // experts.shape[1]], counts)
        outputs = [expert(part) for expert, part in zip(self.experts, inputs, strict=True) if len(part)]
        routed = torch.empty(len(order), x.shape[1], dtype=x.dtype)
        routed[order] = torch.cat(outputs)
        weighted = routed.view(*experts.shape, -1).float() * weights[..., None]  # [T, k, W]
        total: torch.Tensor = weighted.sum(1) + self.shared(x).float()
        return total.to(x.dtype)


def below(tensors: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Tensors whose names begin with `prefix.`, under the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
