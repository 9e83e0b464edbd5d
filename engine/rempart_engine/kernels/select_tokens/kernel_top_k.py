"""The exact top-k of rows of scores on a GPU.

A row is cut into chunks that one program holds in registers. Each round leaves the `top_k` largest of every chunk, as
ascending positions, until one chunk holds all that is left: what is among a row's largest is among its chunk's largest.
Inside a chunk the K-th largest score is found six bits at a time, by counting; equal scores keep the earliest.

Six bits of 32 scores are about 25 instructions of a warp, and 24 bits or so tell scores apart. So 64 rows of 131,072,
which are 512 programs and then 64, should take an H100 some 70 us, and a single row 30.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build

LARGEST_CHUNK = 16_384
"""Scores of one program: 32 registers of each of 512 threads. 131,072 scores and K = 2048 need two rounds of it."""
_LEAST_CHUNK = 1024


def launch_top_k(
    scores: torch.Tensor,  # [C, S] float32, of which positions[c] + 1 are read
    positions: torch.Tensor,  # [C] int32, at most max_context - 1
    max_context: int,
    out: torch.Tensor,  # [C, K] int32, written whole
    counts: torch.Tensor,  # [C] int32, written whole
    largest_chunk: int = LARGEST_CHUNK,
) -> None:
    """Positions of each row's K largest scores, ascending; of equal scores the earliest; NaN is larger than all.

    A row of no more than K scores needs none, and gets all positions, then -1.

    Raises:
        ValueError: K is so large that rounds would leave too much.
    """
    top_k = out.shape[1]
    if top_k > largest_chunk // 2:
        raise ValueError(f"top-k is at most {largest_chunk // 2}, got {top_k}")
    chunk = min(largest_chunk, max(_LEAST_CHUNK, triton.next_power_of_2(max_context)))
    found, width, round_number = out, max_context, 0
    while width > chunk:
        remaining = _remaining(width, chunk, top_k)
        candidates = positions.new_empty(len(positions), remaining)
        _launch(scores, found, positions, candidates, counts, top_k, width, chunk, round_number, is_last=False)
        found, width, round_number = candidates, remaining, round_number + 1
    _launch(scores, found, positions, out, counts, top_k, width, chunk, round_number, is_last=True)


def _remaining(width: int, chunk: int, top_k: int) -> int:
    """How many of `width` candidates a round leaves."""
    return width // chunk * top_k + min(width % chunk, top_k)


def _num_warps(chunk: int) -> int:
    return 16 if chunk >= LARGEST_CHUNK else 8


def _launch(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    counts: torch.Tensor,
    top_k: int,
    width: int,
    chunk: int,
    round_number: int,
    *,
    is_last: bool,
) -> None:
    top_k_round[(len(positions), -(-width // chunk))](
        scores,
        candidates,
        positions,
        out,
        counts,
        scores.stride(0),
        candidates.stride(0),
        out.stride(0),
        top_k,
        ROUND=round_number,
        IS_LAST=is_last,
        CHUNK=chunk,
        num_warps=_num_warps(chunk),
    )


@triton.jit
def _in_order(scores):
    """float32 as uint32 that is larger where the number is, never 0; -0.0 equals 0.0, and NaN is largest."""
    bits = scores.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores == scores, ordered, 0xFFFFFFFF)


@triton.jit
def _load(scores, candidates, places, is_there, HAS_CANDIDATES: tl.constexpr):
    """Positions of candidates, and their scores as numbers in order; 0 where there is none."""
    found = places
    if HAS_CANDIDATES:
        found = tl.load(candidates + places, mask=is_there, other=0)
    return found, tl.where(is_there, _in_order(tl.load(scores + found, mask=is_there, other=0.0)), 0)


@triton.jit
def _threshold(scores, candidates, start, num, wanted, CHUNK: tl.constexpr, HAS_CANDIDATES: tl.constexpr):
    """The leading bits that tell the `wanted` largest of the `num` candidates from `start` on from the others.

    Returns those bits of the least wanted one, a mask of them, and how many that have just these bits are wanted.
    """
    places = tl.arange(0, CHUNK)
    _, ordered = _load(scores, candidates, start + places, places < num, HAS_CANDIDATES)
    bins = tl.arange(0, 64)
    known = tl.full([], 0, tl.uint32)
    mask = tl.full([], 0, tl.uint32)
    missing, in_bin, shift = wanted, num, 32
    # Where nothing is, ordered is 0. It may be counted in bin 0, which then does not end the search early; no threshold
    # is 0, so the last bits tell.
    while (in_bin > missing) & (shift > 0):
        shift = tl.maximum(shift - 6, 0)
        # 64 bins are two a lane of a warp, which counts 32 numbers by six votes and two counts of bits.
        leading = ordered & mask
        digits = ((ordered ^ leading) >> shift.to(tl.uint32)).to(tl.int32)
        histogram = tl.histogram(digits, 64, mask=leading == known)
        at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
        digit = tl.sum((at_least >= missing).to(tl.int32), 0) - 1
        missing -= tl.sum(tl.where(bins > digit, histogram, 0), 0)
        in_bin = tl.sum(tl.where(bins == digit, histogram, 0), 0)
        known |= digit.to(tl.uint32) << shift.to(tl.uint32)
        mask = tl.full([], 0xFFFFFFFF, tl.uint32) << shift.to(tl.uint32)
    return known, mask, missing


@triton.jit
def _write_all(out, length, top_k, CHUNK: tl.constexpr):
    """A row that needs no scores: all its positions, then -1."""
    for start in range(0, top_k, CHUNK):
        places = start + tl.arange(0, CHUNK)
        tl.store(out + places, tl.where(places < length, places, -1), mask=places < top_k)


@triton.jit
def _write_largest(
    scores, candidates, out, start, num, known, mask, missing, PART: tl.constexpr, HAS_CANDIDATES: tl.constexpr
):
    """Those of the `num` candidates from `start` on that are above the threshold, and the first `missing` equal to it.

    Scores are read again, from nearby, rather than kept in registers beside their places.
    """
    num_before = 0  # above the threshold, and 2**16 times those equal to it
    for first in range(0, num, PART):
        places = first + tl.arange(0, PART)
        is_there = places < num
        found, ordered = _load(scores, candidates, start + places, is_there, HAS_CANDIDATES)
        leading = ordered & mask
        is_above = leading > known
        is_equal = (leading == known) & is_there
        counted = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        num_upto = num_before + tl.cumsum(counted, 0)
        num_before += tl.sum(counted, 0)
        num_equal = num_upto >> 16
        place = (num_upto & 0xFFFF) + tl.minimum(num_equal, missing) - 1
        tl.store(out + place, found, mask=is_above | (is_equal & (num_equal <= missing)))


@triton.jit(
    do_not_specialize=["score_stride", "candidate_stride", "out_stride", "top_k"],
    do_not_specialize_on_alignment=["positions", "counts"],  # they begin at any token
)
def top_k_round(
    scores,  # [C, S] float32
    candidates,  # [C, n] int32, ascending positions; unread in round 0, which takes all
    positions,  # [C] int32: a row has one score more
    out,  # [C, K] or [C, n] int32
    counts,  # [C] int32, written by the last round
    score_stride,
    candidate_stride,
    out_stride,
    top_k,
    ROUND: tl.constexpr,
    IS_LAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (c, i): of row c the candidates [i * CHUNK, (i + 1) * CHUNK)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(positions + row) + 1
    out += row * out_stride
    if IS_LAST:
        tl.store(counts + row, tl.minimum(length, top_k))
    if length <= top_k:
        if IS_LAST:
            _write_all(out, length, top_k, CHUNK)
    else:
        num = length
        for _ in tl.static_range(ROUND):
            num = num // CHUNK * top_k + tl.minimum(num % CHUNK, top_k)
        start = chunk * CHUNK
        if start < num:
            num = tl.minimum(num - start, CHUNK)
            wanted = tl.minimum(top_k, num)
            scores += row * score_stride
            candidates += row * candidate_stride
            known, mask, missing = _threshold(scores, candidates, start, num, wanted, CHUNK, ROUND > 0)
            out += chunk * top_k
            _write_largest(scores, candidates, out, start, num, known, mask, missing, CHUNK // 4, ROUND > 0)


def builds() -> Iterator[Build]:
    """Contexts up to a chunk, up to 131,072 (two rounds) and beyond (three) at DeepSeek-V3.2's K of 2048."""
    for chunk, round_number, is_last in (
        (4096, 0, True),
        (8192, 0, True),
        (LARGEST_CHUNK, 0, True),
        (LARGEST_CHUNK, 0, False),
        (LARGEST_CHUNK, 1, True),
        (LARGEST_CHUNK, 1, False),
        (LARGEST_CHUNK, 2, True),
    ):
        yield Build(
            f"top-k, chunks of {chunk}, round {round_number}{', last' if is_last else ''}",
            top_k_round,
            {
                **dict.fromkeys(("scores",), "*fp32"),
                **dict.fromkeys(("candidates", "positions", "out", "counts"), "*i32"),
                **dict.fromkeys(("score_stride", "candidate_stride", "out_stride", "top_k"), "i32"),
            },
            {"ROUND": round_number, "IS_LAST": is_last, "CHUNK": chunk},
            num_warps=_num_warps(chunk),
            num_stages=1,
            aligned=frozenset(("scores", "candidates", "out")),
        )
