"""What routing tokens to experts means."""

import torch


def choose(
    scores: torch.Tensor,  # [T, E] float32, sigmoid of logits
    bias: torch.Tensor,  # [E]
    num_groups: int,
    num_chosen_groups: int,
    num_experts_per_token: int,
    *,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # [T, k] int64, ascending, and [T, k]
    """The best experts of the groups whose best two score highest together, by score and bias; weighed by score."""
    ranked = (scores + bias).view(len(scores), num_groups, -1)
    group_scores = ranked.topk(min(2, ranked.shape[2]), dim=-1).values.sum(-1)
    chosen_groups = group_scores.topk(num_chosen_groups, dim=-1).indices
    is_hidden = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen_groups, False)
    ranked = ranked.masked_fill(is_hidden[..., None], -torch.inf).flatten(1)
    experts = ranked.topk(num_experts_per_token, dim=-1).indices.sort(dim=-1).values
    weights = scores.gather(1, experts)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * routed_scaling_factor
