"""Matrix products with fp8 weights, the mixture of experts, norms."""

from collections.abc import Iterator

import torch
from bench import gpu_work
from bench.dsa_check import check_close
from bench.gpu_points import Point, Sizes, experts_name
from bench.gpu_weights import random_fp8

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks
from rempart_engine.kernels.fp8_linear.gpu import BlockFp8Linear
from rempart_engine.kernels.moe import GroupedExperts
from rempart_engine.kernels.quantize_groups.reference import dequantize_groups, quantize_groups
from rempart_engine.kernels.rms_norm import add_rms_norm
from rempart_engine.kernels.target import Target, target_of
from rempart_engine.model.weights.weight import Weight

_FP8_TOLERANCE = 2.0**-6
"""Relative to the result's size: it is rounded to bfloat16, and so is what lies between two products."""
_EPS = 1e-6


def norm_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """The residual's addition and norm before each half of a layer."""
    width = sizes.model.hidden_size
    for num_tokens in (sizes.batches[-1], sizes.num_queries):
        generator = torch.Generator(device).manual_seed(4)
        residual = torch.randn(num_tokens, width, generator=generator, device=device)
        delta = torch.randn(num_tokens, width, generator=generator, device=device).bfloat16()
        yield _norm_point(residual, delta)


def _norm_point(residual: torch.Tensor, delta: torch.Tensor) -> Point:
    num_tokens, width = residual.shape
    weight = torch.ones(width, device=residual.device)

    def run() -> torch.Tensor:
        return add_rms_norm(residual, delta, weight, _EPS)

    def check(found: torch.Tensor) -> None:  # the residual is what it was normed from, however often it grew
        expected = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + _EPS)
        check_close(found, expected, "norm")

    works = (gpu_work.add_rms_norm(num_tokens, width),)
    return Point("add_rms_norm", f"[{num_tokens}, {width}]", works, run, check)


def linear_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """The projections of a layer, for a step that decodes and for a prompt's chunk."""
    shape = sizes.model
    heads = shape.num_heads
    for name, num_inputs, num_outputs in (
        ("q_a", shape.hidden_size, shape.q_lora_rank),
        ("q_b", shape.q_lora_rank, heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)),
        ("o", heads * shape.v_head_dim, shape.hidden_size),
        ("dense up", shape.hidden_size, shape.intermediate_size),
    ):
        weight = random_fp8((num_outputs, num_inputs), device)
        for num_tokens in (*sizes.batches, sizes.num_queries):
            yield _linear_point(name, weight, num_tokens)


def _linear_point(name: str, weight: Weight, num_tokens: int) -> Point:
    num_outputs, num_inputs = weight.shape
    x = _activations(num_tokens, num_inputs, weight.data.device)
    assert weight.scales is not None, "made so"
    assert weight.block is not None, "made so"
    linear, target = BlockFp8Linear(weight.data, weight.scales, weight.block), target_of(x)

    def run() -> torch.Tensor:
        product: torch.Tensor = linear(x)
        return product

    def check(found: torch.Tensor) -> None:
        some = _some(num_tokens)
        expected = as_multiplied(x[some], target) @ _floats(weight).T
        check_close(found[some], expected, name, _FP8_TOLERANCE)

    works = (gpu_work.fp8_linear(num_tokens, num_inputs, num_outputs),)
    return Point("fp8 linear", f"{name} {num_inputs} -> {num_outputs} x {num_tokens}", works, run, check)


def expert_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """All routed experts of a layer, and an eighth of them, as one of eight GPUs would have them."""
    moe = sizes.model.moe
    for num_experts in (moe.num_experts, moe.num_experts // 8):
        if num_experts < moe.num_experts_per_token:
            continue
        each = [_expert(sizes, device, number) for number in range(num_experts)]
        module = _grouped(sizes, each, device)
        for num_tokens in (*sizes.batches, sizes.num_queries):
            yield _expert_point(sizes, module, each, num_tokens)
        del module, each


Expert = tuple[Weight, Weight, Weight]
"""gate, up and down."""


def _expert(sizes: Sizes, device: torch.device, number: int) -> Expert:
    width, inner = sizes.model.hidden_size, sizes.model.moe.intermediate_size
    return (
        random_fp8((inner, width), device, 3 * number),
        random_fp8((inner, width), device, 3 * number + 1),
        random_fp8((width, inner), device, 3 * number + 2),
    )


def _grouped(sizes: Sizes, each: list[Expert], device: torch.device) -> GroupedExperts:
    model = sizes.model
    module = GroupedExperts(len(each), model.hidden_size, model.moe.intermediate_size, "fp8", device)
    for number, expert in enumerate(each):
        module.write(number, *expert)
    return module


def _expert_point(sizes: Sizes, module: GroupedExperts, each: list[Expert], num_tokens: int) -> Point:
    moe, device = sizes.model.moe, each[0][0].data.device
    generator = torch.Generator(device).manual_seed(5)
    x = _activations(num_tokens, sizes.model.hidden_size, device)
    ranks = torch.rand(num_tokens, len(each), generator=generator, device=device)
    experts = ranks.topk(moe.num_experts_per_token).indices.sort().values
    weights = torch.rand(experts.shape, generator=generator, device=device)
    target = target_of(x)

    def run() -> torch.Tensor:
        total: torch.Tensor = module(x, experts, weights)
        return total

    def check(found: torch.Tensor) -> None:
        for token in _some(num_tokens).tolist():
            parts = (
                weight * _expert_output(each[number], x[token : token + 1], target)[0]
                for number, weight in zip(experts[token].tolist(), weights[token], strict=True)
            )
            check_close(found[token], sum(parts, torch.zeros_like(found[token])), "experts", _FP8_TOLERANCE)

    works = (
        gpu_work.experts(sizes.model, experts.numel(), num_tokens, int(experts.flatten().bincount().count_nonzero())),
    )
    return Point("experts", experts_name(len(each), num_tokens), works, run, check)


def _expert_output(expert: Expert, x: torch.Tensor, target: Target) -> torch.Tensor:  # [1, W] -> [1, W] float32
    gate, up, down = (_floats(weight) for weight in expert)
    x = as_multiplied(x, target)
    inner = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).bfloat16()
    return as_multiplied(inner, target) @ down.T


def _floats(weight: Weight) -> torch.Tensor:  # [out, in] float32, on its device
    assert weight.scales is not None, "made so"
    assert weight.block is not None, "made so"
    return dequantize_blocks(weight.data, weight.scales, weight.block)


def as_multiplied(x: torch.Tensor, target: Target) -> torch.Tensor:  # [T, K] -> float32
    """Activations as the products take them: rounded to e4m3 where fp8 is multiplied."""
    return dequantize_groups(*quantize_groups(x)) if target.has_fp8 else x.float()


def _activations(num_tokens: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator(device).manual_seed(7), device=device).bfloat16()


def _some(num_tokens: int) -> torch.Tensor:
    """The first and the last of them."""
    return torch.tensor(sorted({0, num_tokens - 1}))
