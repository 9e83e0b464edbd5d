"""Products of tokens with the experts they were routed to, activation fused, and their weighted sum."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.fp8_linear.kernel import e4m3_type, quantizes
from rempart_engine.kernels.moe import arrange as tokens
from rempart_engine.kernels.product_tiles import Numbers, Tiles, tiles_for
from rempart_engine.kernels.quantize_groups.kernel import quantize_groups, quantized
from rempart_engine.kernels.quantize_groups.reference import GROUP
from rempart_engine.kernels.target import Target, target_of
from rempart_engine.kernels.triton_scalars import cast
from rempart_engine.kernels.weight_tiles import sum_of_blocks

_COMBINED_PER_PROGRAM = 1024
"""Channels: 8 a thread, in loads of 16 bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The weights of all experts, as `kernels.moe.matrices` stores them."""

    numbers: Numbers
    gate_up: torch.Tensor  # [E, 2, F, W]
    gate_up_scales: torch.Tensor | None
    down: torch.Tensor  # [E, W, F]
    down_scales: torch.Tensor | None


@triton.jit
def _gate_up(
    x,  # [T, W]
    x_scales,  # [T, ceil(W / 128)] if x is e4m3
    weights,  # [E, 2, F, W]
    scales,
    hidden,  # [A, F]
    hidden_scales,  # [A, ceil(F / 128)] if hidden is e4m3
    order,
    tile_experts,
    tile_starts,
    tile_ends,
    num_chosen,  # k
    width,  # W
    intermediate,  # F
    row_stride,
    NUMBERS: tl.constexpr,
    HAS_FP8: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,  # 128 if hidden is e4m3, so that a program sees whole groups
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden = silu(gate(x)) * up(x) for the rows of a tile; a program holds the same outputs of gate and up."""
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        row = tl.load(tile_starts + tile) + tl.arange(0, BLOCK_TOKENS)
        end = tl.load(tile_ends + tile)
        token = (tl.load(order + tl.minimum(row, end - 1)) // num_chosen).to(tl.int64)
        first_output = tl.program_id(0) * BLOCK_OUTPUTS
        output = tl.minimum(first_output + tl.arange(0, BLOCK_OUTPUTS), intermediate - 1)
        weights_at, scales_at, scale_step = _rows_of_expert(
            weights, scales, expert, 2, output, first_output, intermediate, width, NUMBERS, BLOCK_K
        )
        num_groups = tl.cdiv(width, 128)
        stored_width, scales_per_matrix = _sizes(intermediate, width, NUMBERS)
        gate, up = sum_of_blocks(
            weights_at,
            scales_at,
            scale_step,
            x + (token * row_stride)[None, :] + tl.arange(0, BLOCK_K if NUMBERS != "int4" else BLOCK_K // 2)[:, None],
            x_scales + token * num_groups,
            intermediate * stored_width,
            scales_per_matrix,
            0,
            tl.cdiv(width, BLOCK_K),
            width,
            NUMBERS=NUMBERS,
            IS_PAIRED=True,
            IS_EVEN=IS_EVEN,
            BLOCK_K=BLOCK_K,
        )
        # An exponent above 88 is beyond float32; the product is 0 long before.
        value = gate / (1.0 + tl.exp(tl.minimum(-gate, 88.0))) * up
        output = first_output + tl.arange(0, BLOCK_OUTPUTS)
        row = row.to(tl.int64)
        hidden_at = hidden + row[None, :] * intermediate + output[:, None]
        is_there = (output < intermediate)[:, None] & (row < end)[None, :]
        if hidden.dtype.element_ty == tl.uint8:
            value = tl.where((output < intermediate)[:, None], cast(value, tl.bfloat16).to(tl.float32), 0.0)
            bytes_, scale = quantized(value, 0, HAS_FP8)
            tl.store(hidden_at, bytes_, mask=is_there)
            hidden_groups = tl.cdiv(intermediate, 128)
            tl.store(hidden_scales + row * hidden_groups + first_output // 128, scale, mask=row < end)
        else:
            tl.store(hidden_at, cast(value, hidden.dtype.element_ty), mask=is_there)


@triton.jit
def _down(
    hidden,  # [A, F]
    hidden_scales,  # [A, ceil(F / 128)] if hidden is e4m3
    weights,  # [E, W, F]
    scales,
    results,  # [A, W]
    tile_experts,
    tile_starts,
    tile_ends,
    width,  # W
    intermediate,  # F
    NUMBERS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        row = tl.load(tile_starts + tile) + tl.arange(0, BLOCK_TOKENS)
        end = tl.load(tile_ends + tile)
        read = tl.minimum(row, end - 1).to(tl.int64)
        first_output = tl.program_id(0) * BLOCK_OUTPUTS
        output = tl.minimum(first_output + tl.arange(0, BLOCK_OUTPUTS), width - 1)
        weights_at, scales_at, scale_step = _rows_of_expert(
            weights, scales, expert, 1, output, first_output, width, intermediate, NUMBERS, BLOCK_K
        )
        total, _ = sum_of_blocks(
            weights_at,
            scales_at,
            scale_step,
            hidden
            + (read * intermediate)[None, :]
            + tl.arange(0, BLOCK_K if NUMBERS != "int4" else BLOCK_K // 2)[:, None],
            hidden_scales + read * tl.cdiv(intermediate, 128),
            0,
            0,
            0,
            tl.cdiv(intermediate, BLOCK_K),
            intermediate,
            NUMBERS=NUMBERS,
            IS_PAIRED=False,
            IS_EVEN=IS_EVEN,
            BLOCK_K=BLOCK_K,
        )
        output = first_output + tl.arange(0, BLOCK_OUTPUTS)
        results_at = results + row.to(tl.int64)[None, :] * width + output[:, None]
        is_there = (output < width)[:, None] & (row < end)[None, :]
        tl.store(results_at, cast(total, results.dtype.element_ty), mask=is_there)


@triton.jit
def _sizes(num_outputs, num_inputs, NUMBERS: tl.constexpr):
    """Of one matrix: what a row takes, and how many scales there are."""
    num_groups = tl.cdiv(num_inputs, 128)
    stored = num_groups * 64 if NUMBERS == "int4" else num_inputs
    rows_of_scales = tl.cdiv(num_outputs, 128) if NUMBERS == "fp8" else num_outputs
    return stored, rows_of_scales * num_groups


@triton.jit
def _rows_of_expert(
    weights,
    scales,
    expert,
    num_matrices,  # of an expert
    output,  # [R]
    first_output,
    num_outputs,
    num_inputs,
    NUMBERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where an expert's rows and their scales begin, and how far apart a row's scales are."""
    stored, num_scales = _sizes(num_outputs, num_inputs, NUMBERS)
    matrix = expert.to(tl.int64) * num_matrices
    k = tl.arange(0, BLOCK_K if NUMBERS != "int4" else BLOCK_K // 2)
    weights_at = weights + matrix * num_outputs * stored + (output[:, None] * stored + k[None, :])
    if NUMBERS == "fp8":
        scales_at = scales + matrix * num_scales + first_output // 128 * tl.cdiv(num_inputs, 128)
        scale_step = 1
    else:
        scales_at = scales + matrix * num_scales + output
        scale_step = num_outputs
    return weights_at, scales_at, scale_step


@triton.jit
def _combine(results, rows, weights, out, num_chosen, width, BLOCK: tl.constexpr):
    """out = sum of a token's results, each times its weight, in the order of the experts' ids."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = channel < width
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(0, num_chosen):
        row = tl.load(rows + token * num_chosen + place).to(tl.int64)
        weight = tl.load(weights + token * num_chosen + place)
        total += weight * tl.load(results + row * width + channel, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + token * width + channel, total, mask=is_there)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the products of one layer are cut. Both have the same number of tokens in a tile."""

    gate_up: Tiles
    down: Tiles


def cut(target: Target, numbers: Numbers, x_bytes: int, num_assignments: int, num_experts: int) -> Cut:
    """Tiles as wide as an expert has tokens on average, and 16 at least: more experts than tokens read weights only."""
    num_tokens = -(-num_assignments // num_experts)
    num_products = 0 if numbers in ("float32", "bfloat16") else 1
    # Whole groups of hidden channels are quantized where they are computed, which leaves room for half the tokens.
    # So do weights in registers beside the sums of mma.sync.
    rows = 128 if x_bytes == 1 else 64
    most_tokens = 128 if num_products == 0 or (target.has_fp8 and numbers != "fp8") else 64
    gate_up = tiles_for(
        target,
        numbers,
        x_bytes,
        num_tokens,
        rows=rows,
        num_matrices=2,
        most_tokens=most_tokens,
        num_sums=2 + num_products,
    )
    down = tiles_for(
        target,
        numbers,
        x_bytes,
        num_tokens,
        rows=128,
        num_matrices=1,
        most_tokens=most_tokens,
        num_sums=1 + num_products,
    )
    return Cut(gate_up, down)


def _constants(numbers: Numbers, tiles: Tiles, width: int) -> dict[str, bool | int | str]:
    return {
        "NUMBERS": "float" if numbers in ("float32", "bfloat16") else numbers,
        "IS_EVEN": width % tiles.k == 0,
        "BLOCK_OUTPUTS": tiles.rows,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_K": tiles.k,
    }


def grouped_experts(
    x: torch.Tensor,  # [T, W]
    experts: torch.Tensor,  # [T, k]
    weights: torch.Tensor,  # [T, k]
    stack: Stack,
    target: Target | None = None,
) -> torch.Tensor:  # [T, W] float32
    """As `kernels.moe.GroupedExperts.forward`, whose checks it relies on."""
    target = target or target_of(x)
    (num_tokens, width), num_chosen = x.shape, experts.shape[1]
    num_experts, _, intermediate, _ = stack.gate_up.shape
    num_assignments = experts.numel()
    out = x.new_empty((num_tokens, width), dtype=torch.float32)
    if not num_assignments:
        return out.zero_()
    is_quantized = stack.numbers == "fp8" and quantizes(target, x.dtype)
    values, x_scales = quantize_groups(x, target) if is_quantized else (x, None)
    how = cut(target, stack.numbers, values.element_size(), num_assignments, num_experts)
    found = tokens.arrange(experts, num_experts, how.gate_up.tokens)
    num_tiles = len(found.tile_experts)
    read_as = e4m3_type(target)
    hidden = values.new_empty((num_assignments, intermediate))
    hidden_scales = None
    if is_quantized:
        hidden_scales = x.new_empty((num_assignments, -(-intermediate // GROUP)), dtype=torch.float32)
    _gate_up[(triton.cdiv(intermediate, how.gate_up.rows), num_tiles)](
        values if x_scales is None else values.view(read_as),
        values if x_scales is None else x_scales,
        _readable(stack.gate_up, read_as),
        stack.gate_up if stack.gate_up_scales is None else stack.gate_up_scales,
        hidden,
        hidden if hidden_scales is None else hidden_scales,
        found.order,
        found.tile_experts,
        found.tile_starts,
        found.tile_ends,
        num_chosen,
        width,
        intermediate,
        values.stride(0),
        HAS_FP8=target.has_fp8,
        **_constants(stack.numbers, how.gate_up, width),
        num_warps=how.gate_up.num_warps,
        num_stages=how.gate_up.num_stages,
    )
    results = x.new_empty((num_assignments, width))
    _down[(triton.cdiv(width, how.down.rows), num_tiles)](
        hidden if hidden_scales is None else hidden.view(read_as),
        hidden if hidden_scales is None else hidden_scales,
        _readable(stack.down, read_as),
        stack.down if stack.down_scales is None else stack.down_scales,
        results,
        found.tile_experts,
        found.tile_starts,
        found.tile_ends,
        width,
        intermediate,
        **_constants(stack.numbers, how.down, intermediate),
        num_warps=how.down.num_warps,
        num_stages=how.down.num_stages,
    )
    _combine[(num_tokens, triton.cdiv(width, _COMBINED_PER_PROGRAM))](
        results, found.rows, weights, out, num_chosen, width, BLOCK=_COMBINED_PER_PROGRAM, num_warps=4
    )
    return out


def _readable(data: torch.Tensor, e4m3: torch.dtype) -> torch.Tensor:
    """Weights as the kernels read them: integers and nibbles as uint8."""
    if data.dtype == torch.float8_e4m3fn:
        return data.view(e4m3)
    return data.view(torch.uint8) if data.dtype == torch.int8 else data


_WIDTH, _INTERMEDIATE, _NUM_EXPERTS, _NUM_CHOSEN = 7168, 2048, 256, 8
"""Of DeepSeek-V3.2."""


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's experts in every kind of number, from one token to a prefill step."""
    for numbers in ("bfloat16", "fp8", "int8", "int4"):
        is_quantized = numbers == "fp8" and quantizes(target, torch.bfloat16)
        x = "*fp8e4nv" if is_quantized else "*bf16"
        stored = {"bfloat16": "*bf16", "fp8": "*fp8e4nv" if target.has_fp8 else "*u8"}.get(numbers, "*u8")
        scales = "*bf16" if numbers == "bfloat16" else "*fp32"
        x_scales = "*fp32" if is_quantized else x
        seen = set()
        for num_tokens in (1, 1024, 2048, 8192):
            how = cut(target, numbers, 1 if is_quantized else 2, num_tokens * _NUM_CHOSEN, _NUM_EXPERTS)
            if how in seen:
                continue
            seen.add(how)
            tiles = {"tile_experts": "*i32", "tile_starts": "*i32", "tile_ends": "*i32"}
            yield Build(
                name=f"gate and up, {numbers}, {how.gate_up.tokens} tokens a tile",
                kernel=_gate_up,
                arguments={
                    "x": x,
                    "x_scales": x_scales,
                    "weights": stored,
                    "scales": scales,
                    "hidden": "*u8" if is_quantized else "*bf16",
                }
                | {"hidden_scales": x_scales, "order": "*i32"}
                | tiles
                | {"num_chosen": "i32", "width": "i32", "intermediate": "i32", "row_stride": "i32"},
                constants={"HAS_FP8": target.has_fp8} | _constants(numbers, how.gate_up, _WIDTH),
                num_warps=how.gate_up.num_warps,
                num_stages=how.gate_up.num_stages,
                has_large_dot=True,
                aligned=frozenset({"x", "x_scales", "weights", "scales", "hidden", "hidden_scales", "order"})
                | frozenset(tiles)
                | frozenset({"width", "intermediate", "row_stride"}),
            )
            yield Build(
                name=f"down, {numbers}, {how.down.tokens} tokens a tile",
                kernel=_down,
                arguments={"hidden": x, "hidden_scales": x_scales, "weights": stored, "scales": scales}
                | {"results": "*bf16"}
                | tiles
                | {"width": "i32", "intermediate": "i32"},
                constants=_constants(numbers, how.down, _INTERMEDIATE),
                num_warps=how.down.num_warps,
                num_stages=how.down.num_stages,
                has_large_dot=True,
                aligned=frozenset({"hidden", "hidden_scales", "weights", "scales", "results"})
                | frozenset(tiles)
                | frozenset({"width", "intermediate"}),
            )
    yield from tokens.builds(_NUM_EXPERTS, tiles=(16, 32, 64, 128))
    yield Build(
        name="weighted sum",
        kernel=_combine,
        arguments={"results": "*bf16", "rows": "*i32", "weights": "*fp32", "out": "*fp32"}
        | {"num_chosen": "i32", "width": "i32"},
        constants={"BLOCK": _COMBINED_PER_PROGRAM},
        num_warps=4,
        num_stages=3,
        aligned=frozenset({"results", "rows", "weights", "out", "width"}),
    )
