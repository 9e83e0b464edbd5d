"""Routing in one launch: a warp for each token, which holds all its scores in registers."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.target import Target


@triton.jit
def _best(values, is_free, ids, NOBODY: tl.constexpr):
    """Id of the largest of the free values, the smaller id among equals; there is a free one."""
    best = tl.max(tl.where(is_free, values, -float("inf")))
    return tl.min(tl.where(is_free & (values == best), ids, NOBODY))


@triton.jit
def _route(
    logits,  # [T, E]
    bias,  # [E]
    experts,  # [T, k]
    weights,  # [T, k]
    num_experts,
    routed_scaling_factor,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    NORMALIZES: tl.constexpr,
    GROUPS: tl.constexpr,  # powers of two: at least the number of groups,
    MEMBERS: tl.constexpr,  # and of each group's experts
):
    token = tl.program_id(0).to(tl.int64)
    num_members = num_experts // NUM_GROUPS
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, MEMBERS)
    ids = group[:, None] * num_members + member[None, :]  # [GROUPS, MEMBERS]
    is_expert = (group < NUM_GROUPS)[:, None] & (member < num_members)[None, :]
    logit = tl.load(logits + token * num_experts + ids, mask=is_expert, other=0.0)
    # An exponent above 88 is beyond float32; the score is 0 there.
    score = tl.where(logit == logit, 1.0 / (1.0 + tl.exp(tl.minimum(-logit, 88.0))), logit)
    ranked = score + tl.load(bias + ids, mask=is_expert, other=0.0)
    ranked = tl.where(is_expert & (ranked == ranked), ranked, -float("inf"))

    best = tl.max(ranked, 1)
    place = tl.min(tl.where(ranked == best[:, None], member[None, :], MEMBERS), 1)
    second = tl.max(tl.where(member[None, :] == place[:, None], -float("inf"), ranked), 1)
    group_score = tl.where(num_members > 1, best + second, best)
    is_free_group = group < NUM_GROUPS
    for _ in tl.static_range(NUM_CHOSEN_GROUPS):
        is_free_group &= group != _best(group_score, is_free_group, group, GROUPS)
    is_chosen_group = (group < NUM_GROUPS) & (is_free_group == 0)

    ranked = tl.where(is_chosen_group[:, None], ranked, -float("inf"))
    is_free = is_expert
    for _ in tl.static_range(NUM_CHOSEN):
        is_free &= ids != _best(ranked, is_free, ids, GROUPS * MEMBERS)
    is_chosen = is_expert & (is_free == 0)

    weight = score
    if NORMALIZES:
        weight = score / (tl.sum(tl.where(is_chosen, score, 0.0)) + 1e-20)
    # A chosen expert's place is the number of chosen ones with smaller ids.
    chosen = is_chosen.to(tl.int32)
    in_group = tl.sum(chosen, 1)
    place = (tl.cumsum(in_group, 0) - in_group)[:, None] + tl.cumsum(chosen, 1) - chosen
    tl.store(experts + token * NUM_CHOSEN + place, ids.to(tl.int64), mask=is_chosen)
    tl.store(weights + token * NUM_CHOSEN + place, weight * routed_scaling_factor, mask=is_chosen)


def route_tokens(
    logits: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    num_chosen_groups: int,
    num_experts_per_token: int,
    *,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.route_tokens.route_tokens`, whose checks it relies on; all is contiguous."""
    num_tokens, num_experts = logits.shape
    experts = logits.new_empty((num_tokens, num_experts_per_token), dtype=torch.int64)
    weights = logits.new_empty((num_tokens, num_experts_per_token))
    if num_tokens:
        _route[(num_tokens,)](
            logits,
            bias,
            experts,
            weights,
            num_experts,
            routed_scaling_factor,
            **_constants(num_experts, num_groups, num_chosen_groups, num_experts_per_token, normalizes=norm_topk_prob),
            num_warps=1,
        )
    return experts, weights


def _constants(
    num_experts: int, num_groups: int, num_chosen_groups: int, num_experts_per_token: int, *, normalizes: bool
) -> dict[str, bool | int]:
    return {
        "NUM_GROUPS": num_groups,
        "NUM_CHOSEN_GROUPS": num_chosen_groups,
        "NUM_CHOSEN": num_experts_per_token,
        "NORMALIZES": normalizes,
        "GROUPS": triton.next_power_of_2(num_groups),
        "MEMBERS": triton.next_power_of_2(num_experts // num_groups),
    }


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's 256 experts in 8 groups, and GLM-5's in one."""
    del target
    for model, num_groups, num_chosen_groups in (("DeepSeek-V3.2", 8, 4), ("GLM-5", 1, 1)):
        yield Build(
            name=model,
            kernel=_route,
            arguments={"logits": "*fp32", "bias": "*fp32", "experts": "*i64", "weights": "*fp32"}
            | {"num_experts": "i32", "routed_scaling_factor": "fp32"},
            constants=_constants(256, num_groups, num_chosen_groups, 8, normalizes=True),
            num_warps=1,
            num_stages=3,
            aligned=frozenset({"logits", "bias", "experts", "weights", "num_experts"}),
        )
