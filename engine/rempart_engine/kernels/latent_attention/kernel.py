"""Attention over latent records on a GPU: online softmax over 64 keys at a time, a tile of heads together.

One program computes one token, a tile of its heads and a run of its keys, chosen ones or all. Prefill and decode are
the same kernel: where there are too few tokens and heads to fill a GPU, the keys of a token are split over programs,
whose partial results a second kernel merges by their log-sum-exp.

A record is read once and used twice, as key and as value, so with 64 heads a program does 242 FLOP for each byte of a
bfloat16 record. The latent is read in slices of columns: each is one product for the scores and one for the result, and
the narrower it is, the fewer rows a thread has to address.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.latent_cache import GROUP
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kernels.target import Target, target_of
from rempart_engine.kernels.triton_scalars import cast, decode_e4m3, dot

MOST_SPLITS = 128
"""Of a token's keys: twice the multiprocessors of any target are busy with one token of 128 heads."""
_MERGED_SPLITS = 16
"""Partial results that a merging program has in flight: 64 registers of each thread."""
_MERGE_WARPS = 4
_LOG2_E = 1.4426950408889634
_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_GROUP = tl.constexpr(GROUP)
_LOWEST = tl.constexpr(-1e30)
"""Below every score, and still finite, so that differences are."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one program's work is cut."""

    heads: int
    keys: int
    columns: int
    """Of a slice of the latent."""
    num_warps: int
    num_stages: int


@triton.jit
def _is_seen(place, number, stop, position):
    return (number < stop) & (place >= 0) & (place <= position)


@triton.jit
def _rows_of(first, stop, position, is_choosing, chosen, table, KEYS: tl.constexpr):
    """Physical rows of the keys from the first-th on, and which of them are seen; others have a row that exists."""
    number = first + tl.arange(0, KEYS)
    place = tl.load(chosen + number, mask=number < tl.where(is_choosing, stop, 0), other=0)
    place = tl.where(is_choosing, place, number)
    is_seen = _is_seen(place, number, stop, position)
    place = tl.where(is_seen, place, 0)
    return tl.load(table + place // _BLOCK_SIZE) * _BLOCK_SIZE + place % _BLOCK_SIZE, is_seen


@triton.jit
def _are_seen(first, stop, position, is_choosing, chosen, KEYS: tl.constexpr):
    """The second part of `_rows_of` anew, as carrying it to the scores would take registers that are not there.

    Its load looks different, or the compiler would see that it is the same.
    """
    number = first + tl.arange(0, KEYS)
    place = tl.load(
        chosen + number, mask=number < tl.where(is_choosing, stop, 0), other=0, eviction_policy="evict_last"
    )
    return _is_seen(tl.where(is_choosing, place, number), number, stop, position)


@triton.jit
def _is_within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether an index in steps of BLOCK is below SIZE, which needs no asking where the steps are even."""
    if SIZE % BLOCK == 0:
        return tl.full((BLOCK,), 1, tl.int32) > 0
    return index < SIZE


@triton.jit
def _query_rows(
    queries,
    heads,
    head_stride,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Columns from START on of a tile of queries; what lies beyond either end is zero."""
    column = START + tl.arange(0, BLOCK)
    is_inside = _is_within(heads, HEADS, TILE)[:, None] & _is_within(column, DIM, BLOCK)[None, :]
    return tl.load(queries + heads[:, None] * head_stride + column[None, :], mask=is_inside, other=0.0)


@triton.jit
def _plain_rows(
    records,
    rows,
    is_there,
    RECORD: tl.constexpr,
    FIRST: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
):
    """Columns from START on of the part of DIM elements that begins at element FIRST of records."""
    column = START + tl.arange(0, BLOCK)
    at = records + (rows.to(tl.int64) * RECORD)[:, None] + (column + FIRST)[None, :]
    is_inside = is_there[:, None] & _is_within(column, DIM, BLOCK)[None, :]
    return tl.load(at, mask=is_inside, other=0)


@triton.jit
def _decoded(values, IS_NATIVE: tl.constexpr):
    """e4m3 bytes as float32."""
    if IS_NATIVE:
        return values.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return decode_e4m3(values)


@triton.jit
def _fp8_rows(
    records,
    scales,
    rows,
    is_there,
    dtype: tl.constexpr,
    RECORD: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    IS_NATIVE: tl.constexpr,
):
    """Columns from START on of fp8 latents, times their scales."""
    at = rows.to(tl.int64) * RECORD
    scales += at // 4 + DIM // 4
    if BLOCK <= _GROUP:
        values = _plain_rows(records, rows, is_there, RECORD, 0, START, BLOCK, DIM)
        scale = tl.load(scales + START // _GROUP, mask=is_there, other=0.0)
        return cast(_decoded(values, IS_NATIVE) * scale[:, None], dtype)
    # Groups are a dimension of their own, so that each of their scales is read once.
    KEYS: tl.constexpr = rows.shape[0]
    group = tl.arange(0, BLOCK // _GROUP) + START // _GROUP
    column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    is_inside = is_there[:, None, None] & (column < DIM)[None, :, :]
    values = tl.load(records + at[:, None, None] + column[None, :, :], mask=is_inside, other=0)
    scale = tl.load(
        scales[:, None] + group[None, :], mask=is_there[:, None] & (group * _GROUP < DIM)[None, :], other=0.0
    )
    return tl.reshape(cast(_decoded(values, IS_NATIVE) * scale[:, :, None], dtype), (KEYS, BLOCK))


@triton.jit(do_not_specialize=["num_chosen", "table_stride"])
def attend(
    latent_queries,  # [T, H, R], last dimension contiguous
    latent_token_stride,
    latent_head_stride,
    rope_queries,  # [T, H, P], last dimension contiguous
    rope_token_stride,
    rope_head_stride,
    records,  # [N * 64, R + P], or bytes of fp8 records
    scales,  # float32 view of the fp8 records; None of others
    rope_keys,  # bfloat16 view of the fp8 records; the records, of others
    block_tables,  # [B, most blocks] int32
    table_stride,
    token_rows,  # [T] int32
    positions,  # [T] int32
    chosen,  # [T, K] int32
    num_chosen,  # K
    counts,  # [T] int32
    scale,  # of scores, for a softmax in base 2
    out,  # [T, H, R], or [T, splits, H, R] float32 if split
    log_sums,  # [T, splits, H] float32, base 2; None if not split
    HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    IS_NATIVE: tl.constexpr,  # fp8 is decoded by the GPU's own instructions
    TILE: tl.constexpr,  # of heads
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    HOISTS_NOTHING: tl.constexpr,
):
    """Grid (T * tiles of heads, splits): neighbours are the tiles of one token, whose records stay in L2."""
    NUM_TILES: tl.constexpr = (HEADS + TILE - 1) // TILE
    NUM_SLICES: tl.constexpr = (LATENT_DIM + COLUMNS - 1) // COLUMNS
    NUM_GROUPS: tl.constexpr = (LATENT_DIM + _GROUP - 1) // _GROUP
    IS_FP8: tl.constexpr = scales is not None
    RECORD: tl.constexpr = LATENT_DIM + 4 * NUM_GROUPS + 2 * ROPE_DIM if IS_FP8 else LATENT_DIM + ROPE_DIM
    ROPE_RECORD: tl.constexpr = RECORD // 2 if IS_FP8 else RECORD
    ROPE_START: tl.constexpr = LATENT_DIM // 2 + 2 * NUM_GROUPS if IS_FP8 else LATENT_DIM
    dtype: tl.constexpr = latent_queries.dtype.element_ty

    token = (tl.program_id(0) // NUM_TILES).to(tl.int64)
    heads = tl.program_id(0) % NUM_TILES * TILE + tl.arange(0, TILE)
    position = tl.load(positions + token)
    count = tl.load(counts + token)
    is_choosing = count <= position
    num_keys = tl.where(is_choosing, tl.minimum(count, num_chosen), position + 1)
    keys_per_split = tl.cdiv(tl.cdiv(num_keys, KEYS), tl.num_programs(1)) * KEYS
    start = tl.program_id(1) * keys_per_split
    stop = tl.minimum(start + keys_per_split, num_keys)
    chosen += token * num_chosen
    table = block_tables + tl.load(token_rows + token).to(tl.int64) * table_stride

    latent_queries += token * latent_token_stride
    rope_query = _query_rows(
        rope_queries + token * rope_token_stride, heads, rope_head_stride, 0, ROPE_BLOCK, ROPE_DIM, HEADS, TILE
    )
    queries, gathered = (), ()
    for s in tl.static_range(NUM_SLICES):
        query = _query_rows(latent_queries, heads, latent_head_stride, s * COLUMNS, COLUMNS, LATENT_DIM, HEADS, TILE)
        queries = queries + (query,)  # type: ignore[assignment]  # noqa: RUF005 -- Triton unpacks no tuples
        gathered = gathered + (tl.zeros((TILE, COLUMNS), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005 -- Triton unpacks no tuples
    largest = tl.full((TILE,), _LOWEST, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    rows, is_there = _rows_of(start, stop, position, is_choosing, chosen, table, KEYS)
    for first in tl.range(start, stop, KEYS, disable_licm=HOISTS_NOTHING):
        rope_key = _plain_rows(rope_keys, rows, is_there, ROPE_RECORD, ROPE_START, 0, ROPE_BLOCK, ROPE_DIM)
        scores = dot(rope_query, tl.trans(rope_key.to(dtype)), tl.zeros((TILE, KEYS), tl.float32))
        latents = ()
        for s in tl.static_range(NUM_SLICES):
            if IS_FP8:
                latent = _fp8_rows(
                    records, scales, rows, is_there, dtype, RECORD, s * COLUMNS, COLUMNS, LATENT_DIM, IS_NATIVE
                )
            else:
                latent = _plain_rows(records, rows, is_there, RECORD, 0, s * COLUMNS, COLUMNS, LATENT_DIM)
            scores = dot(queries[s], tl.trans(latent), scores)
            latents = latents + (latent,)  # type: ignore[assignment]  # noqa: RUF005 -- Triton unpacks no tuples
        is_seen = _are_seen(first, stop, position, is_choosing, chosen, KEYS)
        scores = tl.where(is_seen[None, :], scores * scale, float("-inf"))
        # Ahead of their use, so that what the loop fetches early does not wait for where it lies.
        rows, is_there = _rows_of(first + KEYS, stop, position, is_choosing, chosen, table, KEYS)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        factor = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        total = total * factor + tl.sum(weights, 1)
        largest = new_largest
        weights = cast(weights, dtype)
        sums = ()
        for s in tl.static_range(NUM_SLICES):
            product = dot(weights, latents[s], gathered[s] * factor[:, None])
            sums = sums + (product,)  # type: ignore[assignment]  # noqa: RUF005 -- Triton unpacks no tuples
        gathered = sums

    some = tl.where(total == 0.0, 1.0, total)
    row = token
    if log_sums is not None:
        row = token * tl.num_programs(1) + tl.program_id(1)
        log_sum = tl.where(total == 0.0, _LOWEST, largest + tl.log2(some))
        tl.store(log_sums + row * HEADS + heads, log_sum, mask=_is_within(heads, HEADS, TILE))
    out += row * (HEADS * LATENT_DIM)
    for s in tl.static_range(NUM_SLICES):
        column = s * COLUMNS + tl.arange(0, COLUMNS)
        is_inside = _is_within(heads, HEADS, TILE)[:, None] & _is_within(column, LATENT_DIM, COLUMNS)[None, :]
        result = cast(gathered[s] / some[:, None], out.dtype.element_ty)
        tl.store(out + heads[:, None] * LATENT_DIM + column[None, :], result, mask=is_inside)


@triton.jit(do_not_specialize=["num_splits"])
def merge(
    partial,  # [T, splits, H, R] float32
    log_sums,  # [T, splits, H] float32, base 2
    num_splits,
    out,  # [T, H, R]
    HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    MOST: tl.constexpr,  # splits, a power of two
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T * H): the mean of a row's partial results, weighted by their sums of exponentials."""
    token = (tl.program_id(0) // HEADS).to(tl.int64)
    first = token * num_splits * HEADS + tl.program_id(0) % HEADS
    all_splits = tl.arange(0, MOST)
    all_sums = tl.load(log_sums + first + all_splits * HEADS, mask=all_splits < num_splits, other=_LOWEST)
    largest = tl.max(all_sums, 0)
    column = tl.arange(0, BLOCK)
    gathered = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, num_splits, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        log_sum = tl.load(log_sums + first + split * HEADS, mask=split < num_splits, other=_LOWEST)
        weight = tl.where(log_sum == _LOWEST, 0.0, tl.exp2(log_sum - largest))
        rows = (first + split * HEADS) * LATENT_DIM
        is_inside = (split < num_splits)[:, None] & (column < LATENT_DIM)[None, :]
        part = tl.load(partial + rows[:, None] + column[None, :], mask=is_inside, other=0.0)
        gathered += tl.sum(part * weight[:, None], 0)
        total += tl.sum(weight, 0)
    result = gathered / tl.where(total == 0.0, 1.0, total)
    at = out + tl.program_id(0).to(tl.int64) * LATENT_DIM + column
    tl.store(at, cast(result, out.dtype.element_ty), mask=column < LATENT_DIM)


def tiling(target: Target, num_heads: int, latent_dim: int, *, is_fp8: bool, is_float32: bool) -> Tiling:
    """What one program takes. Constants are for 64 heads of DeepSeek's latents; smaller ones fit as well."""
    heads = min(64, max(16, triton.next_power_of_2(num_heads)))
    if is_float32:
        # Without tensor cores, for parity tests of small models.
        return _narrowed(Tiling(16, 32, 64, num_warps=4, num_stages=1), latent_dim)
    if target.capability < 90 or heads < 64:
        # sm_80: results of 64 heads would leave no registers for the rest. Later ones: too few rows for wgmma and
        # tcgen05, but then records are what takes time, and mma.sync keeps up with them. Queries of 32 heads and three
        # buffers of 32 keys take 110 KB.
        columns, num_warps = (256 if is_fp8 else 128, 8) if heads > 16 else (128, 4)
        return _narrowed(Tiling(min(heads, 32), 32, columns, num_warps, num_stages=3), latent_dim)
    # Results of 64 heads are 128 registers of each of 256 threads on sm_90, and half of tensor memory on sm_100, where
    # only one slice of all columns is packed so. Of shared memory, queries take 72 KiB, each buffer of 64 records as
    # many again as they are multiplied, and 40 KiB as they lie in fp8.
    if target.capability >= 100:
        cut = Tiling(heads, 64, 512, 8, num_stages=2) if is_fp8 else Tiling(heads, 32, 512, 8, num_stages=3)
    else:
        cut = Tiling(heads, 64, 128, 8, num_stages=3) if is_fp8 else Tiling(heads, 64, 256, 8, num_stages=2)
    return _narrowed(cut, latent_dim)


def _narrowed(wanted: Tiling, latent_dim: int) -> Tiling:
    columns = min(wanted.columns, max(16, triton.next_power_of_2(latent_dim)))
    return Tiling(wanted.heads, wanted.keys, columns, wanted.num_warps, wanted.num_stages)


@cache
def num_splits(num_tokens: int, num_heads: int, most_keys: int, tiling: Tiling, target: Target) -> int:
    """Over how many programs a token's keys are split, so that the slowest multiprocessor is done earliest.

    Time is counted in tiles of keys. A program takes two more, for its queries and its results, and merging costs two.
    """
    programs = num_tokens * -(-num_heads // tiling.heads)
    tiles = max(1, -(-most_keys // tiling.keys))

    def duration(splits: int) -> int:
        rounds = -(-programs * splits // target.num_multiprocessors)
        return rounds * (-(-tiles // splits) + 2) + (2 if splits > 1 else 0)

    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=duration)


def latent_attention(
    latent_queries: torch.Tensor,  # [T, H, R]
    rope_queries: torch.Tensor,  # [T, H, P]
    pool: torch.Tensor,  # [N, 64, R + P], or [N, 64, record bytes] uint8
    step: StepInputs,
    selection: Selection,
    scale: float,
    *,
    target: Target | None = None,
    splits: int | None = None,
) -> torch.Tensor:  # [T, H, R]
    """As `kernels.latent_attention.latent_attention`, whose checks it relies on.

    Chosen positions that are negative or beyond the token's own count as absent; a token that sees nothing gets zeros.
    The target is the GPU itself, and keys are split as `num_splits` says, unless told otherwise.
    """
    num_tokens, num_heads, latent_dim = latent_queries.shape
    rope_dim, num_chosen = rope_queries.shape[2], selection.positions.shape[1]
    target = target or target_of(latent_queries)
    is_fp8, dtype = pool.dtype == torch.uint8, latent_queries.dtype
    cut = tiling(target, num_heads, latent_dim, is_fp8=is_fp8, is_float32=dtype == torch.float32)
    most_keys = min(step.max_context, num_chosen) if num_chosen else step.max_context
    splits = splits or num_splits(num_tokens, num_heads, most_keys, cut, target)
    out = latent_queries.new_empty(num_tokens, num_heads, latent_dim)
    if splits > 1:
        partial = out.new_empty(num_tokens, splits, num_heads, latent_dim, dtype=torch.float32)
        log_sums = out.new_empty(num_tokens, splits, num_heads, dtype=torch.float32)
    attend[num_tokens * -(-num_heads // cut.heads), splits](
        latent_queries,
        latent_queries.stride(0),
        latent_queries.stride(1),
        rope_queries,
        rope_queries.stride(0),
        rope_queries.stride(1),
        pool,
        pool.view(torch.float32) if is_fp8 else None,
        pool.view(torch.bfloat16) if is_fp8 else pool,
        step.block_tables,
        step.block_tables.stride(0),
        step.token_rows,
        step.positions,
        selection.positions,
        num_chosen,
        selection.counts,
        scale * _LOG2_E,
        partial if splits > 1 else out,
        log_sums if splits > 1 else None,
        **_constants(target, num_heads, latent_dim, rope_dim, cut),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    if splits > 1:
        merge[(num_tokens * num_heads,)](
            partial, log_sums, splits, out, **_merge_constants(num_heads, latent_dim), num_warps=_MERGE_WARPS
        )
    return out


def _constants(target: Target, num_heads: int, latent_dim: int, rope_dim: int, cut: Tiling) -> dict[str, object]:
    return {
        "HEADS": num_heads,
        "LATENT_DIM": latent_dim,
        "ROPE_DIM": rope_dim,
        "IS_NATIVE": target.has_fp8,
        "TILE": cut.heads,
        "KEYS": cut.keys,
        "COLUMNS": cut.columns,
        "ROPE_BLOCK": max(16, triton.next_power_of_2(rope_dim)),
        # Addresses of the queries' parts in shared memory, for each instruction, would fill 72 registers over the loop.
        "HOISTS_NOTHING": cut.heads == 64,
    }


def _merge_constants(num_heads: int, latent_dim: int) -> dict[str, object]:
    return {
        "HEADS": num_heads,
        "LATENT_DIM": latent_dim,
        "MOST": MOST_SPLITS,
        "AT_ONCE": _MERGED_SPLITS,
        "BLOCK": max(16, triton.next_power_of_2(latent_dim)),
    }


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2 with its heads on one GPU to eight."""
    latent_dim, rope_dim = 512, 64
    strides = ("latent_token_stride", "latent_head_stride", "rope_token_stride", "rope_head_stride")
    arguments = {
        "latent_queries": "*bf16",
        "rope_queries": "*bf16",
        **dict.fromkeys(strides, "i32"),
        **dict.fromkeys(("block_tables", "token_rows", "positions", "chosen", "counts"), "*i32"),
        **dict.fromkeys(("table_stride", "num_chosen"), "i32"),
        "scale": "fp32",
    }
    for num_heads in (128, 64, 32, 16):
        for is_fp8 in (False, True):
            cut = tiling(target, num_heads, latent_dim, is_fp8=is_fp8, is_float32=False)
            records = {"records": "*u8", "scales": "*fp32"} if is_fp8 else {"records": "*bf16"}
            constants = _constants(target, num_heads, latent_dim, rope_dim, cut) | ({} if is_fp8 else {"scales": None})
            for is_split in (False, True):
                outputs = {"out": "*fp32", "log_sums": "*fp32"} if is_split else {"out": "*bf16"}
                given = {**arguments, **records, "rope_keys": "*bf16", **outputs}
                yield Build(
                    f"{num_heads} heads, {'fp8' if is_fp8 else 'bf16'}{', split' if is_split else ''}",
                    attend,
                    given,
                    constants | ({} if is_split else {"log_sums": None}),
                    cut.num_warps,
                    cut.num_stages,
                    has_large_dot=cut.heads == 64,
                    aligned=frozenset(name for name in given if given[name].startswith("*") or name in strides),
                )
        yield Build(
            f"merge, {num_heads} heads",
            merge,
            {"partial": "*fp32", "log_sums": "*fp32", "num_splits": "i32", "out": "*bf16"},
            _merge_constants(num_heads, latent_dim),
            _MERGE_WARPS,
            num_stages=1,
        )
