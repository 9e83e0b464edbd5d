"""Choice of tokens on a GPU, in two to four launches.

    survey: best token of each chunk  →  select: where top-k and top-p end  →  weigh: kept weight of each chunk  →  draw

Weights are whole numbers, exp((x - max) / temperature) in units of 2**-44, and so is the fraction drawn. Their sums are
exact, so that no order of adding changes a bit, and every comparison with them is exact too. Below 2**-44 of the
likeliest token's weight a token has none: all of them together would weigh less than rounding does in float32.

Order among tokens is one int64 each, a rank: the likelier first, then the smaller id. All ranks of a row differ, so a
set of likeliest tokens is "up to this rank", whatever is equal in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from rempart_engine.host_copies import to_device
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.sample.draws import MAX_VOCAB_SIZE, Draws
from rempart_engine.kernels.target import Target

BAD_RANK = tl.constexpr(-(2**63))  # of NaN and +inf: before all others
NO_RANK = tl.constexpr(2**63 - 1)  # of no token: after all others

ID_BITS = tl.constexpr(MAX_VOCAB_SIZE.bit_length() - 1)
_ID_MASK = tl.constexpr(MAX_VOCAB_SIZE - 1)
_UNIT = tl.constexpr(2.0**44)
_NATS = tl.constexpr(32.0)  # a token this far below the best weighs nothing: exp(-32) < 2**-44
_BITS_A_NAT = tl.constexpr(math.log2(math.e))

_GREEDY, _DRAWN, _RANKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_NUM_PARAMETERS = tl.constexpr(8)  # of a row, in this order
_KIND, _SCALE, _MIN_P, _TOP_K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_TOP_P, _SEED, _CHOICE, _POSITION = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)

_CHUNK_WARPS = 4  # 16 tokens a thread
_ROW_WARPS = 16  # one program has a multiprocessor nearly for itself


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut. Powers of two; nothing of them shows in the result."""

    chunk: int = 2048
    """Tokens of a program where a row has many: at 129,280 tokens 64 programs, enough that few rows fill a GPU."""
    tile: int = 2048
    """Tokens at a time where one program has a row: 4 for each of its threads, one load; 8 spill registers."""
    candidates: int = 4096
    """As few tokens as these are searched in registers, 8 a thread, without reading logits again."""


@triton.jit
def rank_of(x, token_id):
    """int64 [...] of float32 logits and ids: see above."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = ((~ascending).to(tl.int64) << ID_BITS) | token_id
    return tl.where(x < float("inf"), rank, BAD_RANK)


@triton.jit
def value_of(rank):
    """The logit of a rank."""
    ascending = ~((rank >> ID_BITS).to(tl.int32))
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def id_of(rank):
    """The token of a rank."""
    return rank & _ID_MASK


@triton.jit
def random_fraction(seed, choice, position):
    """The number of `philox.uniforms`, times 2**64: uint64, exactly."""
    zero = tl.full((), 0, tl.uint32)
    word0, word1, _, _ = tl.philox(seed, position.to(tl.uint32), choice.to(tl.uint32), zero, zero)
    bits = ((word0 >> 6).to(tl.uint64) << 26) | (word1 >> 6).to(tl.uint64)
    return (bits << 12) | 2048


@triton.jit
def _float_at(pointer):
    return tl.load(pointer).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, best, scale):
    """Weights up to 1, float32."""
    return tl.exp2(tl.maximum(x - best, -1e30) * scale)


@triton.jit
def _units(weight):
    return (weight * _UNIT).to(tl.int64)


@triton.jit
def _best_rank(best_ptr, row, NUM_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr):
    """The likeliest token of a row, from those of its chunks."""
    i = tl.arange(0, CHUNKS)
    return tl.min(tl.load(best_ptr + row * NUM_CHUNKS + i, mask=i < NUM_CHUNKS, other=NO_RANK))


@triton.jit
def _has_token(best_rank):
    """Some token can be chosen."""
    return (best_rank != BAD_RANK) & (value_of(best_rank) > float("-inf"))


@triton.jit
def _kept_units(logits_ptr, token_ids, best, parameters_ptr, threshold, VOCAB: tl.constexpr):
    """Weights of those tokens that pass all filters, 0 for the others."""
    x = tl.load(logits_ptr + token_ids, mask=token_ids < VOCAB, other=float("-inf"))
    weight = _weight(x, best, _float_at(parameters_ptr + _SCALE))
    is_kept = (rank_of(x, token_ids) <= threshold) & (weight >= _float_at(parameters_ptr + _MIN_P))
    return tl.where(is_kept, _units(weight), 0)


@triton.jit
def _threshold(thresholds_ptr, row, kind):
    """The last rank that is kept."""
    threshold = NO_RANK
    if thresholds_ptr is not None:
        threshold = tl.load(thresholds_ptr + row, mask=kind == _RANKED, other=NO_RANK)
    return threshold


@triton.jit
def _survey(
    logits_ptr,  # [P, V] float32
    best_ptr,  # [P, C] int64
    logits_stride,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token_ids < VOCAB
    x = tl.load(logits_ptr + row * logits_stride + token_ids, mask=is_token, other=0.0)
    best = tl.min(tl.where(is_token, rank_of(x, token_ids), NO_RANK))
    tl.store(best_ptr + row * NUM_CHUNKS + chunk, best)


@triton.jit
def _weigh(
    logits_ptr,  # [P, V] float32
    best_ptr,  # [P, C] int64
    parameters_ptr,  # [P, 8] int64
    thresholds_ptr,  # [P] int64, or None
    units_ptr,  # [P, C] int64
    logits_stride,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parameters_ptr += row * _NUM_PARAMETERS
    kind = tl.load(parameters_ptr + _KIND)
    best_rank = _best_rank(best_ptr, row, NUM_CHUNKS, CHUNKS)
    if (kind != _GREEDY) & _has_token(best_rank):
        token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
        threshold = _threshold(thresholds_ptr, row, kind)
        units = _kept_units(
            logits_ptr + row * logits_stride, token_ids, value_of(best_rank), parameters_ptr, threshold, VOCAB
        )
        tl.store(units_ptr + row * NUM_CHUNKS + chunk, tl.sum(units))


@triton.jit
def _draw(
    logits_ptr,  # [P, V] float32
    best_ptr,  # [P, C] int64
    parameters_ptr,  # [P, 8] int64
    thresholds_ptr,  # [P] int64, or None
    units_ptr,  # [P, C] int64, or None: all rows are greedy
    token_ids_ptr,  # [P] int64
    is_bad_ptr,  # [P] bool
    logits_stride,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parameters_ptr += row * _NUM_PARAMETERS
    kind = tl.load(parameters_ptr + _KIND)
    best_rank = _best_rank(best_ptr, row, NUM_CHUNKS, CHUNKS)
    has_token = _has_token(best_rank)
    token_id = id_of(best_rank)
    if units_ptr is not None:  # known when compiled, unlike what follows  # noqa: SIM102
        if (kind != _GREEDY) & has_token:
            seed, choice = tl.load(parameters_ptr + _SEED), tl.load(parameters_ptr + _CHOICE)
            fraction = random_fraction(seed, choice, tl.load(parameters_ptr + _POSITION))
            chunks = tl.arange(0, CHUNKS)
            of_chunks = tl.load(units_ptr + row * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=0)
            # Below the whole, so that some running total exceeds it: the first is at a token with weight.
            goal = tl.umulhi(fraction, tl.sum(of_chunks).to(tl.uint64)).to(tl.int64)
            chunk = tl.sum((tl.cumsum(of_chunks) <= goal).to(tl.int32))
            before = tl.sum(tl.where(chunks < chunk, of_chunks, 0))
            token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
            threshold = _threshold(thresholds_ptr, row, kind)
            units = _kept_units(
                logits_ptr + row * logits_stride, token_ids, value_of(best_rank), parameters_ptr, threshold, VOCAB
            )
            place = tl.sum((before + tl.cumsum(units) <= goal).to(tl.int32))
            token_id = (chunk * CHUNK + place).to(tl.int64)
    tl.store(token_ids_ptr + row, tl.where(has_token, token_id, 0))
    tl.store(is_bad_ptr + row, has_token == 0)


@triton.jit
def _up_to(logits_ptr, rank, best, scale, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """How many tokens have at most this rank, and their weight."""
    counts = tl.zeros([TILE], tl.int32)
    units = tl.zeros([TILE], tl.int64)
    for start in tl.range(0, VOCAB, TILE, num_stages=3):
        token_ids = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token_ids, mask=token_ids < VOCAB, other=float("-inf"))
        is_taken = rank_of(x, token_ids) <= rank
        counts += is_taken.to(tl.int32)
        units += tl.where(is_taken, _units(_weight(x, best, scale)), 0)
    return tl.sum(counts), tl.sum(units)


@triton.jit
def _between(low, high, by_value, VOCAB: tl.constexpr):
    """A rank between two: halfway by value, or by the numbers of all values that floats have, at last by id.

    The first is quick where tokens are spread evenly, the second slow nowhere; taken in turns they are both, nearly.
    """
    key_low, key_high = low >> ID_BITS, high >> ID_BITS
    halfway = rank_of(0.5 * value_of(low) + 0.5 * value_of(high), 0) >> ID_BITS
    key = tl.where(by_value, halfway, (key_low + key_high) >> 1)
    key = tl.minimum(tl.maximum(key, key_low + 1), key_high - 1)
    of_one_value = (tl.maximum(low, (key_high << ID_BITS) - 1) + high) >> 1
    return tl.where(key_high - key_low > 1, (key << ID_BITS) | (VOCAB - 1), of_one_value)


@triton.jit
def _search(
    logits_ptr,  # [V] float32
    scratch_ptr,  # [CANDIDATES] int64
    best,
    scale,
    low,
    high,
    count_high,
    enough,
    counts_tokens,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The first rank up to which there are enough: tokens if `counts_tokens`, else weight. And the weight up to it.

    It lies above `low`, up to which there are no tokens, and not above `high`, up to which there are `count_high` and
    enough.
    """
    count_low = tl.full((), 0, tl.int32)
    units_low = tl.full((), 0, tl.int64)
    by_value = tl.full((), 1, tl.int32)
    while count_high - count_low > CANDIDATES:
        middle = _between(low, high, by_value != 0, VOCAB)
        count, units = _up_to(logits_ptr, middle, best, scale, VOCAB, TILE)
        is_enough = tl.where(counts_tokens, count, units) >= enough
        low, high = tl.where(is_enough, low, middle), tl.where(is_enough, middle, high)
        count_low, count_high = tl.where(is_enough, count_low, count), tl.where(is_enough, count, count_high)
        units_low = tl.where(is_enough, units_low, units)
        by_value = 1 - by_value

    tl.debug_barrier()  # of the search before this one everything has been read
    num_candidates = tl.full((), 0, tl.int32)
    for start in tl.range(0, VOCAB, TILE, num_stages=3):
        token_ids = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token_ids, mask=token_ids < VOCAB, other=float("-inf"))
        rank = rank_of(x, token_ids)
        is_taken = (rank > low) & (rank <= high)
        ones = is_taken.to(tl.int32)
        tl.store(scratch_ptr + num_candidates + tl.cumsum(ones) - 1, rank, mask=is_taken)
        num_candidates += tl.sum(ones)
    tl.debug_barrier()  # other threads read what one has written

    i = tl.arange(0, CANDIDATES)
    ranks = tl.load(scratch_ptr + i, mask=i < num_candidates, other=NO_RANK)
    weight = _weight(value_of(tl.minimum(ranks, high)), best, scale)
    units = tl.where(ranks != NO_RANK, _units(weight), 0)
    amounts = tl.where(counts_tokens, 1, units)
    missing = enough - tl.where(counts_tokens, count_low, units_low)
    while low + 1 < high:
        middle = (low + high) >> 1
        is_enough = tl.sum(tl.where(ranks <= middle, amounts, 0)) >= missing
        low, high = tl.where(is_enough, low, middle), tl.where(is_enough, middle, high)
    return high, units_low + tl.sum(tl.where(ranks <= high, units, 0))


@triton.jit
def _select(
    logits_ptr,  # [P, V] float32
    best_ptr,  # [P, C] int64
    parameters_ptr,  # [P, 8] int64
    scratch_ptr,  # [P, CANDIDATES] int64
    thresholds_ptr,  # [P] int64
    logits_stride,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    parameters_ptr += row * _NUM_PARAMETERS
    scratch_ptr += row * CANDIDATES
    kind = tl.load(parameters_ptr + _KIND)
    best_rank = _best_rank(best_ptr, row, NUM_CHUNKS, CHUNKS)
    if (kind == _RANKED) & _has_token(best_rank):
        best = value_of(best_rank)
        scale = _float_at(parameters_ptr + _SCALE)
        low = ((best_rank >> ID_BITS) << ID_BITS) - 1
        high = rank_of(best - _NATS * _BITS_A_NAT / scale, VOCAB - 1)
        count, units = _up_to(logits_ptr, high, best, scale, VOCAB, TILE)
        top_k = tl.load(parameters_ptr + _TOP_K)
        top_p = tl.load(parameters_ptr + _TOP_P)
        for turn in range(2):  # top-k, then top-p of what is left
            is_top_k = turn == 0
            limit = tl.where(top_k > 0, tl.minimum(top_k, count), count)
            share = tl.umulhi(top_p.to(tl.uint64), units.to(tl.uint64)).to(tl.int64) + 1
            enough = tl.where(is_top_k, limit, share)
            if enough < tl.where(is_top_k, count, units):
                high, units = _search(
                    logits_ptr, scratch_ptr, best, scale, low, high, count, enough, is_top_k, VOCAB, TILE, CANDIDATES
                )
            count = limit.to(tl.int32)
        tl.store(thresholds_ptr + row, high)


def choose_on_gpu(
    logits: torch.Tensor,  # [P, V] float32
    draws: Draws,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [P] int64 and whether they are void [P] bool."""
    tiles = tiles or Tiles()
    num_rows, vocab_size = logits.shape
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    is_bad = logits.new_empty(num_rows, dtype=torch.bool)
    if num_rows == 0:
        return token_ids, is_bad
    num_chunks = triton.cdiv(vocab_size, tiles.chunk)
    whole = {"VOCAB": vocab_size, "NUM_CHUNKS": num_chunks}
    chunks = {"CHUNKS": triton.next_power_of_2(num_chunks)}
    best = logits.new_empty(num_rows, num_chunks, dtype=torch.int64)
    stride = logits.stride(0)
    _survey[(num_rows, num_chunks)](logits, best, stride, **whole, CHUNK=tiles.chunk, num_warps=_CHUNK_WARPS)
    parameters = to_device(_packed(draws), logits.device)
    thresholds = units = None
    if draws.is_ranked.any():
        thresholds = torch.empty_like(token_ids)
        scratch = logits.new_empty(num_rows, tiles.candidates, dtype=torch.int64)
        _select[(num_rows,)](
            logits, best, parameters, scratch, thresholds, stride, **whole, **chunks,
            TILE=tiles.tile, CANDIDATES=tiles.candidates, num_warps=_ROW_WARPS,
        )  # fmt: skip
    if not draws.is_greedy.all():
        units = torch.empty_like(best)
        _weigh[(num_rows, num_chunks)](
            logits, best, parameters, thresholds, units, stride, **whole, **chunks,
            CHUNK=tiles.chunk, num_warps=_CHUNK_WARPS,
        )  # fmt: skip
    _draw[(num_rows,)](
        logits, best, parameters, thresholds, units, token_ids, is_bad, stride, **whole, **chunks,
        CHUNK=tiles.chunk, num_warps=_CHUNK_WARPS,
    )  # fmt: skip
    return token_ids, is_bad


def _packed(draws: Draws) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[P, 8], all in one copy. Floats are bits; top_p is ceil(top_p * 2**64) - 1, so that 1 is -1."""
    columns = np.empty((len(draws), _NUM_PARAMETERS.value), np.int64)
    columns[:, _KIND.value] = np.where(draws.is_greedy, _GREEDY.value, _DRAWN.value)
    columns[draws.is_ranked, _KIND.value] = _RANKED.value
    columns[:, _SCALE.value] = (_BITS_A_NAT.value / draws.temperature).astype(np.float32).view(np.int32)
    columns[:, _MIN_P.value] = draws.min_p.astype(np.float32).view(np.int32)
    columns[:, _TOP_K.value] = draws.top_k
    has_top_p = draws.top_p < 1.0
    columns[:, _TOP_P.value] = -1
    fractions = np.ceil(draws.top_p[has_top_p] * 2.0**64).astype(np.uint64)
    columns[has_top_p, _TOP_P.value] = (fractions - np.uint64(1)).view(np.int64)
    columns[:, _SEED.value] = draws.seed.view(np.int64)
    columns[:, _CHOICE.value] = draws.choice
    columns[:, _POSITION.value] = draws.positions
    return columns


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's vocabulary; a batch of greedy rows, one that filters nothing, and one of all kinds."""
    tiles = Tiles()
    vocab_size = 129_280
    num_chunks = triton.cdiv(vocab_size, tiles.chunk)
    survey = {"VOCAB": vocab_size, "NUM_CHUNKS": num_chunks, "CHUNK": tiles.chunk}
    chunks = survey | {"CHUNKS": triton.next_power_of_2(num_chunks)}
    rows = {"logits_ptr": "*fp32", "best_ptr": "*i64", "logits_stride": "i32"}
    outputs = {"token_ids_ptr": "*i64", "is_bad_ptr": "*i1"}
    parameters = {"parameters_ptr": "*i64"}
    thresholds = {"thresholds_ptr": "*i64"}
    units = {"units_ptr": "*i64"}

    def build(name: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], num_warps: int) -> Build:
        aligned = frozenset(rows | {name: kind for name, kind in arguments.items() if kind.startswith("*")})
        return Build(name, kernel, rows | arguments, constants, num_warps, num_stages=1, aligned=aligned)

    yield build("best tokens of chunks", _survey, {}, survey, _CHUNK_WARPS)
    select = {name: chunks[name] for name in ("VOCAB", "NUM_CHUNKS", "CHUNKS")}
    select |= {"TILE": tiles.tile, "CANDIDATES": tiles.candidates}
    yield build(
        "end of top-k and top-p", _select, parameters | {"scratch_ptr": "*i64"} | thresholds, select, _ROW_WARPS
    )
    for filters, given, absent in (("all", {}, {"thresholds_ptr": None}), ("some rows filtered", thresholds, {})):
        yield build(f"weights, {filters}", _weigh, parameters | given | units, chunks | absent, _CHUNK_WARPS)
        yield build(f"draw, {filters}", _draw, parameters | given | units | outputs, chunks | absent, _CHUNK_WARPS)
    nothing = {"thresholds_ptr": None, "units_ptr": None}
    yield build("all greedy", _draw, parameters | outputs, chunks | nothing, _CHUNK_WARPS)
