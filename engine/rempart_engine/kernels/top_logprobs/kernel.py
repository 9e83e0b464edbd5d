"""Log-probabilities on a GPU, in two launches: each chunk of a row gives its sum and its likeliest tokens, in order;
then one program per row merges them. Sums have a fixed order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from rempart_engine.host_copies import to_device
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.sample.kernel import BAD_RANK, NO_RANK, id_of, rank_of, value_of
from rempart_engine.kernels.target import Target

_CHUNK = 2048
"""As many tokens as a program has in the survey of `sample`, for the same reasons."""
_NUM_WARPS = 4


@triton.jit
def _finite(x):
    """0 for -inf, so that it can be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _summarise(
    logits_ptr,  # [P, V] float32
    rows_ptr,  # [W] int64
    maxima_ptr,  # [W, C] float32
    sums_ptr,  # [W, C] float32: of exp(x - maximum)
    ranks_ptr,  # [W, C, M] int64, ascending
    logits_stride,
    num_top,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    wanted, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = wanted * NUM_CHUNKS + chunk
    token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token_ids < VOCAB
    row = tl.load(rows_ptr + wanted)
    x = tl.load(logits_ptr + row * logits_stride + token_ids, mask=is_token, other=float("-inf"))
    ranks = tl.where(is_token, rank_of(x, token_ids), NO_RANK)
    x = tl.where(x < float("inf"), x, float("-inf"))
    maximum = tl.max(x)
    tl.store(maxima_ptr + place, maximum)
    tl.store(sums_ptr + place, tl.sum(tl.exp(x - _finite(maximum))))
    last = tl.full((), BAD_RANK, tl.int64)
    for number in range(num_top):
        last = tl.min(tl.where(ranks > last, ranks, NO_RANK))
        tl.store(ranks_ptr + place * num_top + number, last)


@triton.jit
def _merge(
    logits_ptr,  # [P, V] float32
    rows_ptr,  # [W] int64
    token_ids_ptr,  # [W] int64
    maxima_ptr,  # [W, C] float32
    sums_ptr,  # [W, C] float32
    ranks_ptr,  # [W, C, M] int64
    chosen_ptr,  # [W] float32
    top_ids_ptr,  # [W, M] int64
    top_logprobs_ptr,  # [W, M] float32
    logits_stride,
    num_top,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    wanted = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < NUM_CHUNKS
    places = wanted * NUM_CHUNKS + chunks
    maxima = tl.load(maxima_ptr + places, mask=is_chunk, other=float("-inf"))
    maximum = _finite(tl.max(maxima))
    total = tl.sum(tl.load(sums_ptr + places, mask=is_chunk, other=0.0) * tl.exp(maxima - maximum))
    log_total = tl.log(tl.where(total > 0.0, total, 1.0))
    row = tl.load(rows_ptr + wanted)
    x = tl.load(logits_ptr + row * logits_stride + tl.load(token_ids_ptr + wanted))
    tl.store(chosen_ptr + wanted, x - maximum - log_total)

    ranks_ptr += places * num_top  # [C]: where each chunk's list begins
    numbers = tl.zeros([CHUNKS], tl.int32)  # of the first that was not taken, in each list
    heads = tl.load(ranks_ptr, mask=is_chunk & (numbers < num_top), other=NO_RANK)
    for number in range(num_top):
        best = tl.min(heads)
        is_none = best == NO_RANK
        tl.store(top_ids_ptr + wanted * num_top + number, tl.where(is_none, 0, id_of(best)))
        logprob = value_of(best) - maximum - log_total
        tl.store(top_logprobs_ptr + wanted * num_top + number, tl.where(is_none, float("-inf"), logprob))
        is_taken = (heads == best) & (heads != NO_RANK)
        numbers += is_taken.to(tl.int32)
        following = tl.load(ranks_ptr + numbers, mask=is_taken & (numbers < num_top), other=NO_RANK)
        heads = tl.where(is_taken, following, heads)


def top_logprobs_on_gpu(
    logits: torch.Tensor,  # [P, V] float32
    rows: NDArray[np.int64],  # [W]
    token_ids: torch.Tensor,  # [W] int64
    num_top: int,  # M
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the chosen tokens [W] float32; ids [W, M] int64 and values [W, M] float32 of the likeliest."""
    num_wanted, vocab_size = len(rows), logits.shape[1]
    chosen = logits.new_empty(num_wanted)
    top_ids = token_ids.new_empty(num_wanted, num_top)
    top_values = logits.new_empty(num_wanted, num_top)
    if num_wanted == 0:
        return chosen, top_ids, top_values
    constants = _constants(vocab_size)
    maxima = logits.new_empty(num_wanted, constants["NUM_CHUNKS"])
    sums = torch.empty_like(maxima)
    ranks = token_ids.new_empty(num_wanted, constants["NUM_CHUNKS"], num_top)
    device_rows = to_device(rows, logits.device)
    stride = logits.stride(0)
    _summarise[(num_wanted, constants["NUM_CHUNKS"])](
        logits, device_rows, maxima, sums, ranks, stride, num_top, vocab_size, constants["NUM_CHUNKS"], _CHUNK,
        num_warps=_NUM_WARPS,
    )  # fmt: skip
    _merge[(num_wanted,)](
        logits, device_rows, token_ids, maxima, sums, ranks, chosen, top_ids, top_values, stride, num_top, **constants,
        num_warps=1,
    )  # fmt: skip
    return chosen, top_ids, top_values


def _constants(vocab_size: int) -> dict[str, Any]:
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    return {"NUM_CHUNKS": num_chunks, "CHUNKS": triton.next_power_of_2(num_chunks)}


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's vocabulary."""
    vocab_size = 129_280
    constants = _constants(vocab_size)
    inputs = {"logits_ptr": "*fp32", "rows_ptr": "*i64"}
    chunks = {"maxima_ptr": "*fp32", "sums_ptr": "*fp32", "ranks_ptr": "*i64"}
    outputs = {"token_ids_ptr": "*i64", "chosen_ptr": "*fp32", "top_ids_ptr": "*i64", "top_logprobs_ptr": "*fp32"}
    numbers = {"logits_stride": "i32", "num_top": "i32"}
    of_chunks = {"VOCAB": vocab_size, "NUM_CHUNKS": constants["NUM_CHUNKS"], "CHUNK": _CHUNK}
    for name, kernel, arguments, of_kernel, num_warps in (
        ("likeliest of chunks", _summarise, inputs | chunks, of_chunks, _NUM_WARPS),
        ("likeliest of rows", _merge, inputs | chunks | outputs, constants, 1),
    ):
        aligned = frozenset({*arguments, "logits_stride"})
        yield Build(name, kernel, arguments | numbers, of_kernel, num_warps, num_stages=1, aligned=aligned)
