"""Routing on the GPU path, against its reference."""

import pytest
import torch

from rempart_engine.kernels.route_tokens import route_tokens
from rempart_engine.kernels.route_tokens.reference import choose

SHAPES = [
    # experts, groups, chosen groups, experts per token
    (256, 8, 4, 8),
    (256, 1, 1, 8),
    (20, 4, 2, 3),
    (15, 5, 1, 3),
    (6, 6, 2, 2),
    (2, 1, 1, 1),
    (7, 1, 1, 7),
]


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("num_experts", "num_groups", "num_chosen_groups", "num_chosen"), SHAPES)
def test_choice_and_weights_are_the_references(
    num_experts: int,
    num_groups: int,
    num_chosen_groups: int,
    num_chosen: int,
    normalizes: bool,
    device: torch.device,
) -> None:
    torch.manual_seed(num_experts)
    logits, bias = torch.randn(9, num_experts) * 3, torch.randn(num_experts) * 0.3
    experts, weights = route_tokens(
        logits.to(device),
        bias.to(device),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        num_experts_per_token=num_chosen,
        norm_topk_prob=normalizes,
        routed_scaling_factor=2.5,
    )
    want_experts, want_weights = choose(
        torch.sigmoid(logits),
        bias,
        num_groups,
        num_chosen_groups,
        num_chosen,
        norm_topk_prob=normalizes,
        routed_scaling_factor=2.5,
    )
    assert experts.dtype == torch.int64
    assert torch.equal(experts.cpu(), want_experts)
    torch.testing.assert_close(weights.cpu(), want_weights, rtol=2**-20, atol=0)


def route_8_of_256(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, weights = route_tokens(
        logits,
        bias,
        num_groups=8,
        num_chosen_groups=4,
        num_experts_per_token=8,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    return experts.cpu(), weights.cpu()


def test_smaller_ids_come_first_among_equals(device: torch.device) -> None:
    logits = torch.zeros(2, 256, device=device)
    logits[1, [100, 101, 250]] = 1.0
    experts, weights = route_8_of_256(logits, torch.zeros(256, device=device))
    assert experts.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 100, 101, 250]]
    torch.testing.assert_close(weights[0], torch.full((8,), 2.5 / 8))


def test_a_group_is_hidden_whatever_its_experts_score(device: torch.device) -> None:
    """One expert alone scores highest of all, in a group whose second is worst."""
    logits = torch.full((1, 256), -1.0)
    logits[0, 32:192] = 0.5  # groups 1 to 5
    logits[0, 7] = 0.9
    bias = torch.zeros(256)
    bias[:32] = -0.3
    bias[7] = 0.0
    experts, _ = route_8_of_256(logits.to(device), bias.to(device))
    assert 7 not in experts
    assert experts.tolist() == [[32, 33, 34, 35, 36, 37, 38, 39]]


def test_chosen_by_bias_weighed_without_it(device: torch.device) -> None:
    """Groups 0, 1 and 7 score the same, and two of them are chosen."""
    logits, bias = torch.zeros(1, 256), torch.zeros(256)
    bias[[3, 40, 80, 81, 120, 121, 122, 255]] = 5.0
    experts, weights = route_8_of_256(logits.to(device), bias.to(device))
    assert experts.tolist() == [[0, 3, 40, 80, 81, 120, 121, 122]]
    torch.testing.assert_close(weights, torch.full((1, 8), 2.5 / 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38, -1e38])
def test_ids_are_valid_whatever_the_logits(value: float, device: torch.device) -> None:
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    clean = route_8_of_256(logits.to(device), torch.zeros(256, device=device))
    logits[1] = value
    logits[2, ::3] = value
    experts, weights = route_8_of_256(logits.to(device), torch.zeros(256, device=device))
    assert ((experts >= 0) & (experts < 256)).all()
    assert (experts[:, 1:] > experts[:, :-1]).all()
    for row in (0, 3):
        assert torch.equal(experts[row], clean[0][row])
        assert torch.equal(weights[row], clean[1][row])


def test_more_experts_than_the_chosen_groups_have(device: torch.device) -> None:
    """Hidden ones fill up, distinct and in bounds."""
    experts, _ = route_tokens(
        torch.randn(3, 6, device=device),
        torch.zeros(6, device=device),
        num_groups=3,
        num_chosen_groups=1,
        num_experts_per_token=4,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )
    assert (experts[:, 1:] > experts[:, :-1]).all()
    assert ((experts >= 0) & (experts < 6)).all()


def test_rows_may_lie_apart_and_none_is_no_work(device: torch.device) -> None:
    wide = torch.randn(5, 512, device=device)
    bias = torch.zeros(256, device=device)
    apart = route_8_of_256(wide[:, ::2], bias)
    together = route_8_of_256(wide[:, ::2].contiguous(), bias)
    assert torch.equal(apart[0], together[0])
    assert route_8_of_256(wide[:0, :256], bias)[0].shape == (0, 8)


def test_what_cannot_be_chosen_is_named(device: torch.device) -> None:
    def route(logits: torch.Tensor, groups: int = 4, chosen_groups: int = 2, chosen: int = 3) -> None:
        route_tokens(
            logits,
            torch.zeros(20, device=device),
            num_groups=groups,
            num_chosen_groups=chosen_groups,
            num_experts_per_token=chosen,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )

    logits = torch.zeros(2, 20, device=device)
    with pytest.raises(ValueError, match="bfloat16"):
        route(logits.bfloat16())
    with pytest.raises(ValueError, match="19 experts"):
        route(logits[:, :19])
    with pytest.raises(ValueError, match="3 groups"):
        route(logits, groups=3)
    with pytest.raises(ValueError, match="5 of 4"):
        route(logits, chosen_groups=5)
    with pytest.raises(ValueError, match="21 of 20"):
        route(logits, chosen=21)
