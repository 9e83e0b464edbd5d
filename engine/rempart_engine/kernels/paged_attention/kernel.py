"""Paged attention on a GPU: online softmax over KV blocks, the query heads of one KV head together.

One program computes a tile of one sequence's new tokens under one KV head, over a run of its KV blocks. Prefill and
decode are the same kernel: decode has too few tiles to fill a GPU, so there the blocks of a sequence are split over
programs, whose partial results a second kernel merges by their log-sum-exp.

A program's matrix has (tokens of the tile) x (query heads of a KV head) rows. Tiles of 16 tokens are cut for every
backend alike; with four query heads per KV head they are the 64 rows that one warp group multiplies by wgmma. Larger
tiles would read each block from L2 less often, which at 64 rows allows about a third of an H100's bfloat16 rate; they
would have to be cut in `inputs.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import TILE_TOKENS, StepInputs
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.target import Target, target_of
from rempart_engine.kernels.triton_scalars import cast, dot

LARGEST_DIM = 256
"""Head size up to which queries and two stages of a KV block fit into the shared memory of each target shipped."""
MOST_SPLITS = 64
"""So many partial rows the merging program holds in registers."""
_LOG2_E = 1.4426950408889634
_LOWEST = tl.constexpr(-1e30)
"""Below every score, and still finite, so that differences are."""


@triton.jit(do_not_specialize=["table_stride", "num_tokens"])
def attend(
    q,  # [T, H, DIM], last dimension contiguous
    q_token_stride,
    q_head_stride,
    k_pool,  # [N, HEADS / GROUP, DIM, BLOCK]
    v_pool,  # [N, HEADS / GROUP, BLOCK, DIM]
    block_tables,  # [B, most blocks] int32
    table_stride,
    tile_rows,  # [tiles] which sequence
    tile_tokens,  # [tiles] first token of the tile in the step
    tile_sizes,  # [tiles] tokens in the tile
    positions,  # [T]
    num_tokens,
    scale,  # of scores, for a softmax in base 2
    out,  # [splits, T, H, DIM]
    log_sums,  # [splits, T, H] float32, base 2; None if nothing is split
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PARTS_PER_TILE: tl.constexpr,
):
    """Grid (tiles * PARTS_PER_TILE, KV heads, splits): neighbours share a KV head, whose blocks stay in L2."""
    tile = tl.program_id(0) // PARTS_PER_TILE
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = (tl.program_id(0) % PARTS_PER_TILE) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    key = tl.arange(0, BLOCK)

    # Rows go token by token, the heads of the group together; rows beyond the tile see nothing and are not stored.
    is_row = row < tl.load(tile_sizes + tile) * GROUP
    token = (tl.load(tile_tokens + tile) + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    position = tl.load(positions + token, mask=is_row, other=-1)
    q_rows = q + token * q_token_stride + head * q_head_stride
    queries = tl.load(q_rows[:, None] + dim[None, :], mask=is_row[:, None] & (dim < DIM)[None, :], other=0.0)

    num_keys = tl.max(position, 0) + 1
    num_blocks = (num_keys + BLOCK - 1) // BLOCK
    blocks_per_split = tl.cdiv(num_blocks, tl.num_programs(2))
    first_block = split * blocks_per_split
    end_block = tl.minimum(first_block + blocks_per_split, num_blocks)
    table = block_tables + tl.load(tile_rows + tile).to(tl.int64) * table_stride

    highest = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    next_block = tl.load(table + first_block, mask=first_block < end_block, other=0)
    for block in range(first_block, end_block):
        offset = (next_block.to(tl.int64) * (HEADS // GROUP) + kv_head) * (DIM * BLOCK)
        # A step ahead, so that loads of keys and values do not wait for it, and are pipelined to the full depth.
        next_block = tl.load(table + block + 1, mask=block + 1 < end_block, other=0)
        # Whatever lies in keys beyond the end, their scores are replaced. Values are multiplied, by a zero, so that
        # they must be masked; by whole rows, which leaves the loads wide.
        keys = tl.load(k_pool + offset + dim[:, None] * BLOCK + key[None, :], mask=(dim < DIM)[:, None], other=0.0)
        is_key = block * BLOCK + key < num_keys
        values = tl.load(
            v_pool + offset + key[:, None] * DIM + dim[None, :],
            mask=is_key[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        scores = dot(queries, keys, tl.zeros((ROWS, BLOCK), tl.float32)) * scale
        scores = tl.where(block * BLOCK + key[None, :] <= position[:, None], scores, _LOWEST)
        # A row that sees nothing of its first block sees nothing later either: its weights are wrong but finite, and
        # its log-sum is so low that they do not count.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        rescale = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * rescale + tl.sum(weights, 1)
        result = dot(cast(weights, values.dtype), values, result * rescale[:, None])
        highest = new_highest

    out_row = (split.to(tl.int64) * num_tokens + token) * HEADS + head
    total = tl.where(total == 0.0, 1.0, total)  # of a split without blocks, or a row beyond the tile; NaN stays
    if first_block < end_block:
        tl.store(
            out + out_row[:, None] * DIM + dim[None, :],
            cast(result / total[:, None], out.dtype.element_ty),
            mask=is_row[:, None] & (dim < DIM)[None, :],
        )
    if log_sums is not None:
        tl.store(log_sums + out_row, highest + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge(
    partial,  # [splits, rows, DIM] float32, undefined where the log-sum is the lowest
    log_sums,  # [splits, rows] float32
    num_rows,
    num_splits,
    out,  # [rows, DIM]
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Grid (rows,): the mean of a row's partial results, weighted by the sums they stand for."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED_SPLITS)
    dim = tl.arange(0, PADDED_DIM)
    rows = split.to(tl.int64) * num_rows + row
    log_sum = tl.load(log_sums + rows, mask=split < num_splits, other=_LOWEST)
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    parts = tl.load(
        partial + rows[:, None] * DIM + dim[None, :],
        mask=(weights > 0.0)[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    mean = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * DIM + dim, cast(mean, out.dtype.element_ty), mask=dim < DIM)


@dataclass(frozen=True, slots=True)
class Config:
    """How `attend` is compiled for one model in one kind of step."""

    rows: int
    padded_dim: int
    parts_per_tile: int
    num_warps: int
    num_stages: int


def config_for(target: Target, dtype: torch.dtype, dim: int, group: int, tile_tokens: int) -> Config:
    """Tile sizes for heads of `dim`, `group` query heads per KV head and at most `tile_tokens` tokens in a tile."""
    tile_rows = tile_tokens * group
    padded_dim = _padded(dim)
    # The most results that stay in registers: 64 of each of 4 warps' threads, as scores, weights and addresses need as
    # many again; 8 warps where products are asynchronous, as mma.sync has its operands in registers too. float32 has no
    # tensor cores here: its products are multiply-adds, which need still more.
    can_be_asynchronous = target.capability >= 90
    is_float32 = dtype == torch.float32
    most_results = 16 * 128 if is_float32 else (128 if can_be_asynchronous else 64) * 128
    width = max(padded_dim, 128)  # scores count as well: 64, and as many weights
    rows = min(_padded(tile_rows), max(16, most_results // width))
    num_warps = 8 if is_float32 or rows * width > 64 * 128 else 4
    # Three stages if two programs of a multiprocessor still fit. The asynchronous products of sm_90 and later hold all
    # of them, and take weights from registers; mma.sync holds two, and weights change threads through shared memory.
    is_asynchronous = can_be_asynchronous and rows >= 64
    held = (rows + 2 * BLOCK_SIZE * (3 if is_asynchronous else 2)) * padded_dim
    bytes_held = (held if is_asynchronous else held + rows * BLOCK_SIZE) * dtype.itemsize
    num_stages = 3 if 2 * bytes_held <= target.shared_bytes else 2
    return Config(rows, padded_dim, triton.cdiv(tile_rows, rows), num_warps, num_stages)


def num_splits_for(target: Target, num_programs: int, max_context: int, *, single_tokens: bool) -> int:
    """Over how many programs the blocks of a sequence are spread, given how many there are of each split."""
    num_blocks = -(-max_context // BLOCK_SIZE)
    to_fill = 2 * target.num_multiprocessors // num_programs  # two programs fit on a multiprocessor
    # One long sequence among short ones: its blocks must not all wait for one program. 256 blocks of Llama-3 are 8 MiB,
    # a tenth of a millisecond for one multiprocessor. With prefill, partial results would take too much memory.
    to_balance = num_blocks // 256 if single_tokens else 1
    # Less than 4 blocks are read faster than a program starts and is merged.
    return max(1, min(max(to_fill, to_balance), num_blocks // 4, MOST_SPLITS))


def paged_attention(
    q: torch.Tensor,  # [T, H, D], last dimension contiguous
    k_pool: torch.Tensor,  # [N, Hk, D, 64] contiguous
    v_pool: torch.Tensor,  # [N, Hk, 64, D] contiguous
    step: StepInputs,
    scale: float,
    *,
    target: Target | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:  # [T, H, D]
    """Attention of each new token over its sequence's cached tokens. No tile of the step may be empty.

    Raises:
        ValueError: heads are too large.
    """
    target = target or target_of(q)
    num_tokens, num_heads, dim = q.shape
    num_kv_heads, num_tiles = k_pool.shape[1], step.tile_rows.shape[0]
    group = num_heads // num_kv_heads
    if dim > LARGEST_DIM:
        raise ValueError(f"head size {dim} exceeds {LARGEST_DIM}, the largest that fits a GPU")
    single_tokens = num_tokens == num_tiles
    config = config_for(target, q.dtype, dim, group, 1 if single_tokens else TILE_TOKENS)
    num_parts = num_tiles * config.parts_per_tile
    if num_splits is None:
        num_splits = num_splits_for(
            target, max(num_parts * num_kv_heads, 1), step.max_context, single_tokens=single_tokens
        )
    out = q.new_empty(num_tokens, num_heads, dim)
    partial, log_sums = out, None
    if num_splits > 1:
        partial = q.new_empty(num_splits, num_tokens, num_heads, dim, dtype=torch.float32)
        log_sums = q.new_empty(num_splits, num_tokens, num_heads, dtype=torch.float32)
    attend[num_parts, num_kv_heads, num_splits](
        q,
        q.stride(0),
        q.stride(1),
        k_pool,
        v_pool,
        step.block_tables,
        step.block_tables.stride(0),
        step.tile_rows,
        step.tile_tokens,
        step.tile_sizes,
        step.positions,
        num_tokens,
        scale * _LOG2_E,
        partial,
        log_sums,
        **_attend_constants(config, num_heads, group, dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if log_sums is not None:
        num_rows = num_tokens * num_heads
        constants = _merge_constants(dim, num_splits)
        merge[num_rows,](partial, log_sums, num_rows, num_splits, out, **constants, num_warps=_MERGE_WARPS)
    return out


_MERGE_WARPS = 4


def _padded(size: int) -> int:
    """The power of two that holds `size`, and that a product can have."""
    return max(16, int(triton.next_power_of_2(size)))


def _attend_constants(config: Config, num_heads: int, group: int, dim: int) -> dict[str, int]:
    return {
        "HEADS": num_heads,
        "GROUP": group,
        "DIM": dim,
        "BLOCK": BLOCK_SIZE,
        "ROWS": config.rows,
        "PADDED_DIM": config.padded_dim,
        "PARTS_PER_TILE": config.parts_per_tile,
    }


def _attend_types(*, is_split: bool) -> dict[str, str]:
    types = {
        "q": "*bf16",
        "q_token_stride": "i32",
        "q_head_stride": "i32",
        "k_pool": "*bf16",
        "v_pool": "*bf16",
        "block_tables": "*i32",
        "table_stride": "i32",
        "tile_rows": "*i32",
        "tile_tokens": "*i32",
        "tile_sizes": "*i32",
        "positions": "*i32",
        "num_tokens": "i32",
        "scale": "fp32",
        "out": "*fp32" if is_split else "*bf16",
    }
    return types | ({"log_sums": "*fp32"} if is_split else {})


def _merge_constants(dim: int, num_splits: int) -> dict[str, int]:
    return {"DIM": dim, "PADDED_DIM": _padded(dim), "PADDED_SPLITS": triton.next_power_of_2(num_splits)}


_POINTERS = {"q", "k_pool", "v_pool", "block_tables", "tile_rows", "tile_tokens", "tile_sizes", "positions", "out"}
_ALIGNED = frozenset(_POINTERS | {"log_sums", "q_token_stride", "q_head_stride"})
"""Strides too, as heads are."""


def builds(target: Target) -> Iterator[Build]:
    """What serves Llama-3-8B and SmolLM2-135M in bfloat16."""
    for model, num_heads, num_kv_heads, dim in (("Llama-3-8B", 32, 8, 128), ("SmolLM2", 9, 3, 64)):
        group = num_heads // num_kv_heads
        for kind, tile_tokens in (("prefill", TILE_TOKENS), ("decode", 1)):
            config = config_for(target, torch.bfloat16, dim, group, tile_tokens)
            for is_split in (False, True):
                yield Build(
                    name=f"{kind}{', split' if is_split else ''}, {model}",
                    kernel=attend,
                    arguments=_attend_types(is_split=is_split),
                    constants=_attend_constants(config, num_heads, group, dim)
                    | ({} if is_split else {"log_sums": None}),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    has_large_dot=config.rows >= 64,
                    aligned=_ALIGNED if is_split else _ALIGNED - {"log_sums"},
                )
        for num_splits in (2, MOST_SPLITS):
            yield Build(
                name=f"{num_splits} splits, {model}",
                kernel=merge,
                arguments={
                    "partial": "*fp32",
                    "log_sums": "*fp32",
                    "num_rows": "i32",
                    "num_splits": "i32",
                    "out": "*bf16",
                },
                constants=_merge_constants(dim, num_splits),
                num_warps=_MERGE_WARPS,
                num_stages=1,
            )
