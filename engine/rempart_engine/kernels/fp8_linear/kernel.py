"""Products with fp8 weights on a GPU, and how they are cut into tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.product_tiles import Tiles, tiles_for
from rempart_engine.kernels.quantize_groups.kernel import quantize_groups
from rempart_engine.kernels.quantize_groups.reference import GROUP
from rempart_engine.kernels.target import Target, target_of
from rempart_engine.kernels.triton_scalars import cast
from rempart_engine.kernels.weight_tiles import sum_of_blocks

_MOST_SPLIT_TOKENS = 512
"""Beyond, a program sums all splits itself: partial sums would take much memory, and there are programs enough."""
_ADDED_PER_PROGRAM = 1024
_TILES_PER_GROUP = tl.constexpr(8)
"""Tiles of outputs that neighbours compute for one tile of tokens, so that L2 serves what they share."""


@dataclass(frozen=True, slots=True)
class Splits:
    """How the sum over K is cut; it depends on the weights' shape alone, so that each row's sum has one order."""

    count: int
    groups: int
    """Groups of 128 inputs in each split, the last one's excepted."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one product is cut."""

    tiles: Tiles
    splits: Splits
    is_split: bool
    """Each program computes one split, and another kernel adds them."""
    sums_splits: bool
    """Each program computes every split, one after another."""


def splits_for(target: Target, num_outputs: int, width: int) -> Splits:
    """As many as give every multiprocessor two programs, where a decode step's tiles alone leave many without any."""
    num_tiles, num_groups = -(-num_outputs // 64), -(-width // GROUP)
    if 4 * num_tiles >= 3 * target.num_multiprocessors:
        return Splits(1, num_groups)
    groups = -(-num_groups // (-(-2 * target.num_multiprocessors // num_tiles)))
    return Splits(-(-num_groups // groups), groups)


@triton.jit
def _multiply(
    x,  # [T, K]
    x_scales,  # [T, G] float32 if x is e4m3
    weights,  # [N, K]
    scales,  # [ceil(N / 128), G] float32 if weights are fp8
    out,  # [T, N], or [S, T, N] float32
    num_tokens,
    num_outputs,
    width,
    row_stride,
    num_splits,
    groups_per_split,
    NUMBERS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,  # each program computes one split, into float32
    SUMS_SPLITS: tl.constexpr,  # each program computes every split
    BLOCK_OUTPUTS: tl.constexpr,  # divides 128
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles in the order that keeps `_TILES_PER_GROUP` tiles of weights in L2 while tokens pass by.
    num_output_tiles = tl.cdiv(num_outputs, BLOCK_OUTPUTS)
    num_token_tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    pid = tl.program_id(0)
    first_tile = pid // (_TILES_PER_GROUP * num_token_tiles) * _TILES_PER_GROUP
    num_neighbours = tl.minimum(num_output_tiles - first_tile, _TILES_PER_GROUP)
    place = pid % (_TILES_PER_GROUP * num_token_tiles)
    first_output = (first_tile + place % num_neighbours) * BLOCK_OUTPUTS
    first_token = place // num_neighbours * BLOCK_TOKENS

    # What lies beyond the end is computed from the last row again, and not stored.
    row = tl.minimum(tl.arange(0, BLOCK_OUTPUTS), num_outputs - 1 - first_output)
    token = tl.minimum(tl.arange(0, BLOCK_TOKENS), num_tokens - 1 - first_token)
    k = tl.arange(0, BLOCK_K)
    num_groups = tl.cdiv(width, 128)
    num_blocks = tl.cdiv(width, BLOCK_K)
    weights_at = weights + first_output.to(tl.int64) * width + (row[:, None] * width + k[None, :])
    scales_at = scales + first_output // 128 * num_groups
    x_at = x + first_token.to(tl.int64) * row_stride + (token[None, :] * row_stride + k[:, None])
    x_scales_at = x_scales + first_token.to(tl.int64) * num_groups + token * num_groups
    blocks_per_split = groups_per_split * (128 // BLOCK_K)
    total = tl.zeros((BLOCK_OUTPUTS, BLOCK_TOKENS), tl.float32)
    for split in range(0, num_splits if SUMS_SPLITS else 1):
        first = (split + tl.program_id(1)) * blocks_per_split
        last = tl.minimum(first + blocks_per_split, num_blocks)
        part, _ = sum_of_blocks(
            weights_at,
            scales_at,
            1,
            x_at,
            x_scales_at,
            0,
            0,
            first,
            last,
            width,
            NUMBERS=NUMBERS,
            IS_PAIRED=False,
            IS_EVEN=IS_EVEN,
            BLOCK_K=BLOCK_K,
        )
        total += part
    output = first_output + tl.arange(0, BLOCK_OUTPUTS)
    column = first_token + tl.arange(0, BLOCK_TOKENS)
    if IS_SPLIT:
        out += tl.program_id(1).to(tl.int64) * num_tokens * num_outputs
    out_at = out + column.to(tl.int64)[None, :] * num_outputs + output[:, None]
    is_there = (output < num_outputs)[:, None] & (column < num_tokens)[None, :]
    tl.store(out_at, cast(total, out.dtype.element_ty), mask=is_there)


@triton.jit
def _add_splits(partial, out, size, num_splits, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, num_splits):
        total += tl.load(partial + place, mask=place < size, other=0.0)
        partial += size
    tl.store(out + place, cast(total, out.dtype.element_ty), mask=place < size)


def quantizes(target: Target, dtype: torch.dtype) -> bool:
    """Whether activations of this type are quantized too, so that e4m3 is multiplied with e4m3."""
    return target.has_fp8 and dtype == torch.bfloat16


def e4m3_type(target: Target) -> torch.dtype:
    """As what kernels of products read e4m3: its own type where the GPU knows it."""
    return torch.float8_e4m3fn if target.has_fp8 else torch.uint8


def cut(target: Target, num_tokens: int, num_outputs: int, width: int, x_bytes: int) -> Cut:
    """Decode reads weights, in tiles small enough for many multiprocessors; prefill multiplies, in large tiles."""
    splits = splits_for(target, num_outputs, width)
    is_split = splits.count > 1 and num_tokens <= _MOST_SPLIT_TOKENS
    sums_splits = splits.count > 1 and not is_split
    tiles = tiles_for(
        target,
        "fp8",
        x_bytes,
        num_tokens,
        rows=64 if num_tokens <= 64 else 128,
        most_tokens=64 if sums_splits else 128,
        num_sums=3 if sums_splits else 2,
    )
    return Cut(tiles, splits, is_split, sums_splits)


def multiply(
    x: torch.Tensor,  # [T, K] float32 or bfloat16
    weights: torch.Tensor,  # [N, K] float8_e4m3fn or float32
    scales: torch.Tensor | None,  # [ceil(N / 128), ceil(K / 128)] float32 with fp8
    target: Target | None = None,
) -> torch.Tensor:  # [T, N], of x's type
    """x W^T: with quantized activations where the GPU multiplies e4m3 and x is bfloat16, else with x as it is.

    As `kernels.fp8_linear.gpu.BlockFp8Linear`, whose checks it relies on.
    """
    target = target or target_of(x)
    (num_tokens, width), num_outputs = x.shape, len(weights)
    out = x.new_empty((num_tokens, num_outputs))
    if not out.numel():
        return out
    is_fp8 = scales is not None
    values, x_scales = quantize_groups(x, target) if is_fp8 and quantizes(target, x.dtype) else (x, None)
    how = cut(target, num_tokens, num_outputs, width, values.element_size())
    tiles, splits = how.tiles, how.splits
    into = x.new_empty((splits.count, num_tokens, num_outputs), dtype=torch.float32) if how.is_split else out
    read_as = e4m3_type(target)
    num_tiles = triton.cdiv(num_outputs, tiles.rows) * triton.cdiv(num_tokens, tiles.tokens)
    _multiply[(num_tiles, splits.count if how.is_split else 1)](
        values if x_scales is None else values.view(read_as),
        values if x_scales is None else x_scales,
        weights.view(read_as) if is_fp8 else weights,
        weights if scales is None else scales,
        into,
        num_tokens,
        num_outputs,
        width,
        values.stride(0),
        splits.count,
        splits.groups,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_constants(how, width, is_fp8=is_fp8),
    )
    if how.is_split:
        _add_splits[(triton.cdiv(out.numel(), _ADDED_PER_PROGRAM),)](
            into, out, out.numel(), splits.count, BLOCK=_ADDED_PER_PROGRAM, num_warps=4
        )
    return out


def _constants(how: Cut, width: int, *, is_fp8: bool) -> dict[str, bool | int | str]:
    return {
        "NUMBERS": "fp8" if is_fp8 else "float",
        "IS_EVEN": width % how.tiles.k == 0,
        "IS_SPLIT": how.is_split,
        "SUMS_SPLITS": how.sums_splits,
        "BLOCK_OUTPUTS": how.tiles.rows,
        "BLOCK_TOKENS": how.tiles.tokens,
        "BLOCK_K": how.tiles.k,
    }


_SHAPES = {
    "q_a": (1536, 7168),
    "q_b": (24576, 1536),
    "kv_a": (576, 7168),
    "o": (7168, 16384),
    "dense up": (18432, 7168),
    "dense down": (7168, 18432),
}
"""Outputs and inputs of DeepSeek-V3.2's layers with fp8 weights, the experts' excepted."""


def builds(target: Target) -> Iterator[Build]:
    """Every layer of DeepSeek-V3.2, from one token to a prefill step; what is the same is compiled once."""
    seen = set()
    is_quantized = quantizes(target, torch.bfloat16)
    for layer, (num_outputs, width) in _SHAPES.items():
        for num_tokens in (1, 32, 64, 128, 8192):
            how = cut(target, num_tokens, num_outputs, width, 1 if is_quantized else 2)
            constants = _constants(how, width, is_fp8=True)
            if tuple(constants.values()) in seen:
                continue
            seen.add(tuple(constants.values()))
            x, out = "*fp8e4nv" if is_quantized else "*bf16", "*fp32" if how.is_split else "*bf16"
            yield Build(
                name=f"{layer} [{num_outputs}, {width}], {num_tokens} tokens",
                kernel=_multiply,
                arguments={
                    "x": x,
                    "x_scales": "*fp32" if is_quantized else x,
                    "weights": "*fp8e4nv" if target.has_fp8 else "*u8",
                    "scales": "*fp32",
                }
                | {"out": out, "num_tokens": "i32", "num_outputs": "i32", "width": "i32", "row_stride": "i32"}
                | {"num_splits": "i32", "groups_per_split": "i32"},
                constants=constants,
                num_warps=how.tiles.num_warps,
                num_stages=how.tiles.num_stages,
                has_large_dot=True,
                aligned=frozenset({"x", "x_scales", "weights", "scales", "out", "num_outputs", "width", "row_stride"}),
            )
    yield Build(
        name="sum of splits",
        kernel=_add_splits,
        arguments={"partial": "*fp32", "out": "*bf16", "size": "i32", "num_splits": "i32"},
        constants={"BLOCK": _ADDED_PER_PROGRAM},
        num_warps=4,
        num_stages=3,
        aligned=frozenset({"partial", "out", "size"}),
    )
