"""Index scores on a GPU: score[t, s] = scale[s] * sum over heads of weight[t, h] * relu(query[t, h] . key[s]).

A program multiplies 128 keys or more by the heads of one token at a time, heads side by side, so that a score is a sum
within a thread and its neighbours. Where a tile has several tokens, keys are read once for all of them.

At decode this is bound by bytes: 132 a key against 16,384 operations. What is launched are about as many programs as
fit on the GPU at once, or more where each would have more than 4096 keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import TILE_TOKENS, StepInputs
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.select_tokens.kernel_queries import Queries, padded
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import dot, fp8_dot

PAGE_KEYS = tl.constexpr(BLOCK_SIZE)
_PROGRAMS_PER_MULTIPROCESSOR = 3
_MOST_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Config:
    """How the kernel is launched."""

    block_keys: int
    num_warps: int
    num_stages: int


def config_for(target: Target, key_bytes: int, *, is_one_token: bool) -> Config:
    """By the bytes of a key and whether every tile is a single token.

    A single token waits for keys: many small loads in flight, three programs beside each other. More tokens wait for
    their queries, 8 KB or 16 KB for each block of keys: the larger the block, the fewer.
    """
    if not is_one_token:
        return Config(256, 8, 3) if target.has_fp8 else Config(128, 4, 3)
    return Config(128, 4, 4 if key_bytes <= 128 else 2)


def launch_scores(
    queries: Queries,
    pool: torch.Tensor,  # [N, 64, D] of the queries' type, or [N, 64 * (D + 4)] uint8
    step: StepInputs,
    first_token: int,
    top_k: int,
    target: Target,
    out: torch.Tensor,  # [C, S] float32: scores of tokens [first_token, first_token + C), each up to its position
) -> None:
    """Scores of those tokens that see more than `top_k`."""
    _, num_heads, dim = queries.values.shape
    end_token = first_token + len(out)
    is_one_token = len(step.tile_rows) == len(step.positions)
    first_tile, end_tile = (
        (first_token, end_token)
        if is_one_token
        else (first_token // TILE_TOKENS, min(end_token, len(step.tile_rows)))  # a tile has 1 to 16 tokens
    )
    if first_tile >= end_tile:
        return
    is_fp8 = pool.dtype == torch.uint8
    config = config_for(target, dim * (1 if is_fp8 else pool.element_size()), is_one_token=is_one_token)
    keys_per_program = _keys_per_program(end_tile - first_tile, step.max_context, config.block_keys, target)
    index_scores[(end_tile - first_tile, -(-step.max_context // keys_per_program))](
        queries.values,
        queries.weights,
        pool.view(torch.float8_e4m3fn) if is_fp8 and target.has_fp8 else pool,
        pool.view(torch.float32) if is_fp8 else queries.weights,
        step.block_tables,
        step.tile_rows,
        step.tile_tokens,
        step.tile_sizes,
        step.positions,
        out,
        first_tile,
        first_token,
        end_token,
        top_k,
        step.block_tables.stride(0),
        out.stride(0),
        keys_per_program,
        **_constants(num_heads, dim, is_fp8=is_fp8, has_fp8=target.has_fp8, is_one_token=is_one_token),
        BLOCK_KEYS=config.block_keys,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _keys_per_program(num_tiles: int, max_context: int, block_keys: int, target: Target) -> int:
    """A multiple of `block_keys`: few enough for all multiprocessors to have work, and to end at about one time."""
    at_once = _PROGRAMS_PER_MULTIPROCESSOR * target.num_multiprocessors
    blocks = -(-num_tiles * -(-max_context // block_keys) // at_once)
    return min(blocks * block_keys, _MOST_KEYS)


def _constants(num_heads: int, dim: int, *, is_fp8: bool, has_fp8: bool, is_one_token: bool) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "DIM": dim,
        "IS_FP8": is_fp8,
        "HAS_FP8": has_fp8,
        "IS_ONE_TOKEN": is_one_token,
        "BLOCK_HEADS": padded(num_heads, 16),
        "BLOCK_DIM": padded(dim, 32),  # products of e4m3 are of 32 at least
    }


@triton.jit
def _load_keys(
    keys, scales, table, places, DIM: tl.constexpr, IS_FP8: tl.constexpr, HAS_FP8: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Keys [keys, D] of a sequence's places as they are multiplied, and what their scores are multiplied by."""
    block = tl.load(table + places // PAGE_KEYS).to(tl.int64)
    offset = places % PAGE_KEYS
    page_size: tl.constexpr = PAGE_KEYS * (DIM + 4) if IS_FP8 else PAGE_KEYS * DIM
    dims = tl.arange(0, BLOCK_DIM)
    pointers = keys + (block * page_size + offset * DIM)[:, None] + dims[None, :]
    values = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    if IS_FP8:
        scale = tl.load(scales + block * (page_size // 4) + PAGE_KEYS * DIM // 4 + offset)
        if not HAS_FP8:
            # Exponent and fraction put where float16 has them are the key times 2**-8, exactly, subnormals too. That a
            # NaN becomes 480 is of no concern: its sequence is lost anyway.
            bits = values.to(tl.int16)
            values = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
            scale *= 256.0
    else:
        scale = tl.full(places.shape, 1.0, tl.float32)
    return values, scale


@triton.jit
def _load_query(
    queries,
    weights,
    token,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A token's heads [Hi, D] and their weights [Hi]; heads that are not there weigh nothing."""
    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    places = (tl.full([], 0, tl.int64) + token) * NUM_HEADS + heads  # in the interpreter a loop counts in Python's int
    is_there = (heads < NUM_HEADS)[:, None] & (dims < DIM)[None, :]
    query = tl.load(queries + places[:, None] * DIM + dims[None, :], mask=is_there, other=0.0)
    return query, tl.load(weights + places, mask=heads < NUM_HEADS, other=0.0)


@triton.jit
def _scores(keys, scale, query, weight, IS_E4M3: tl.constexpr):
    """Scores [keys] of one token: heads are columns, so that each sum is within a few lanes, in one order always.

    Products of e4m3 stay in the tensor cores for all of D, with the digits that those keep (sm_90: about 13 bits).
    """
    nothing = tl.zeros([keys.shape[0], query.shape[0]], tl.float32)
    products = fp8_dot(keys, tl.trans(query), nothing) if IS_E4M3 else dot(keys, tl.trans(query), nothing)
    return tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1) * scale


@triton.jit(do_not_specialize=["first_tile", "first_token", "end_token", "top_k", "table_stride"])
def index_scores(
    queries,  # [T, Hi, D]
    weights,  # [T, Hi] float32
    keys,  # [N, 64, D] of the queries' type, or fp8 pages [N, 64 * (D + 4)] as e4m3, as uint8 without fp8
    key_scales,  # the same pages as float32; unread unless they are fp8
    block_tables,  # [B, most blocks] int32
    tile_rows,  # [tiles] int32
    tile_tokens,  # [tiles] int32
    tile_sizes,  # [tiles] int32
    positions,  # [T] int32
    out,  # [C, S] float32
    first_tile,
    first_token,
    end_token,
    top_k,
    table_stride,
    out_stride,
    keys_per_program,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_FP8: tl.constexpr,
    IS_ONE_TOKEN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Program (i, j): tokens of tile first_tile + i against places [j, j + 1) * keys_per_program.

    Programs that run at the same time are of neighbouring tiles, which share keys in prefill.
    """
    tile = first_tile + tl.program_id(0)
    tile_start = tl.load(tile_tokens + tile)
    start = tl.maximum(tile_start, first_token)
    stop = tl.minimum(tile_start + tl.load(tile_sizes + tile), end_token)
    if start < stop:
        last_position = tl.load(positions + stop - 1)
        start = tl.maximum(start, stop - 1 - (last_position - top_k))  # the first that sees more than top_k
        begin = tl.program_id(1) * keys_per_program
        end = tl.minimum(begin + keys_per_program, last_position + 1)
        table = block_tables + tl.load(tile_rows + tile).to(tl.int64) * table_stride
        lanes = tl.arange(0, BLOCK_KEYS)
        IS_E4M3: tl.constexpr = IS_FP8 and HAS_FP8
        if IS_ONE_TOKEN:
            if start < stop:
                query, weight = _load_query(queries, weights, start, NUM_HEADS, DIM, BLOCK_HEADS, BLOCK_DIM)
                out += (start - first_token).to(tl.int64) * out_stride
                for key in range(begin, end, BLOCK_KEYS):
                    places = tl.minimum(key + lanes, end - 1)
                    values, scale = _load_keys(keys, key_scales, table, places, DIM, IS_FP8, HAS_FP8, BLOCK_DIM)
                    scores = _scores(values, scale, query, weight, IS_E4M3)
                    tl.store(out + key + lanes, scores, mask=key + lanes < end)
        else:
            for key in range(begin, end, BLOCK_KEYS):
                places = tl.minimum(key + lanes, end - 1)
                values, scale = _load_keys(keys, key_scales, table, places, DIM, IS_FP8, HAS_FP8, BLOCK_DIM)
                for token in range(start, stop):
                    query, weight = _load_query(queries, weights, token, NUM_HEADS, DIM, BLOCK_HEADS, BLOCK_DIM)
                    scores = _scores(values, scale, query, weight, IS_E4M3)
                    length = tl.minimum(end, last_position + 1 - (stop - 1 - token))
                    row = out + (token - first_token).to(tl.int64) * out_stride
                    tl.store(row + key + lanes, scores, mask=key + lanes < length)


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's 64 heads of 128, for every kind of pool; GLM-5 has 32."""
    queries = {"bf16": "*bf16", "fp8": "*fp8e4nv" if target.has_fp8 else "*fp16"}
    pools = {"bf16": "*bf16", "fp8": "*fp8e4nv" if target.has_fp8 else "*u8"}
    integers = ("first_tile", "first_token", "end_token", "top_k", "table_stride")
    multiples = ("out_stride", "keys_per_program")  # of 64
    floats = ("weights", "key_scales", "out")
    tables = ("block_tables", "tile_rows", "tile_tokens", "tile_sizes", "positions")
    for kind in ("bf16", "fp8"):
        for is_one_token in (True, False):
            config = config_for(target, 128 if kind == "fp8" else 256, is_one_token=is_one_token)
            for num_heads in (64, 32):
                yield Build(
                    f"scores, {'a token' if is_one_token else 'tiles'}, {kind} keys, {num_heads} heads",
                    index_scores,
                    {
                        "queries": queries[kind],
                        "keys": pools[kind],
                        **dict.fromkeys(floats, "*fp32"),
                        **dict.fromkeys(tables, "*i32"),
                        **dict.fromkeys((*integers, *multiples), "i32"),
                    },
                    {
                        **_constants(
                            num_heads, 128, is_fp8=kind == "fp8", has_fp8=target.has_fp8, is_one_token=is_one_token
                        ),
                        "BLOCK_KEYS": config.block_keys,
                    },
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    has_large_dot=True,
                    aligned=frozenset(("queries", "keys", *floats, *tables, *multiples)),
                )
