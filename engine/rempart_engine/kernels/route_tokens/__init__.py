"""Which experts a token takes, and with what weight (DeepSeek-V3, section 2.1.2), in float32."""

import torch

from rempart_engine.kernels.route_tokens.reference import choose
from rempart_engine.kernels.sigmoid import sigmoid
from rempart_engine.kernels.target import runs_triton


def route_tokens(
    logits: torch.Tensor,  # [T, E] float32
    bias: torch.Tensor,  # [E] float32
    *,
    num_groups: int,
    num_chosen_groups: int,
    num_experts_per_token: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # [T, k] int64 and [T, k] float32
    """Ids of each token's experts, ascending, and their weights. The bias chooses, and never weighs.

    Args:
        num_groups: experts come in so many groups of neighbours; a group scores what its best two experts score.
        num_chosen_groups: the best groups, whose experts alone can be chosen.
        num_experts_per_token: k.
        norm_topk_prob: weights are divided by their sum.
        routed_scaling_factor: what weights are multiplied with at last.

    On a GPU the smaller id is first among equals. Ids are valid and distinct even for logits that are no numbers.

    Raises:
        ValueError: shapes or types are others, or there are not so many groups or experts to choose.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(
            f"logits [T, E] and their bias are float32, not {tuple(logits.shape)} in {logits.dtype} and {bias.dtype}"
        )
    num_experts = logits.shape[1]
    if bias.shape != (num_experts,):
        raise ValueError(f"a bias {tuple(bias.shape)} does not fit {num_experts} experts")
    if num_groups < 1 or num_experts % num_groups or not 1 <= num_chosen_groups <= num_groups:
        raise ValueError(f"{num_chosen_groups} of {num_groups} groups cannot be chosen from {num_experts} experts")
    if not 1 <= num_experts_per_token <= num_experts:
        raise ValueError(f"{num_experts_per_token} of {num_experts} experts cannot be chosen")
    if not runs_triton(logits):
        return choose(
            sigmoid(logits),
            bias,
            num_groups,
            num_chosen_groups,
            num_experts_per_token,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
        )
    from rempart_engine.kernels.route_tokens.kernel import route_tokens as on_gpu

    return on_gpu(
        logits.contiguous(),
        bias.contiguous(),
        num_groups,
        num_chosen_groups,
        num_experts_per_token,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )
