"""Index queries as the scores' kernel multiplies them: for fp8 pools in e4m3, like the keys, one scale a head."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.index_cache.cpu import LEAST_AMAX as _LEAST_AMAX
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import E4M3_LARGEST, decode_e4m3, encode_e4m3, power_of_two_scale

LEAST_AMAX = tl.constexpr(float(_LEAST_AMAX))
_NUM_WARPS = 8


@dataclass(frozen=True, slots=True)
class Queries:
    """Index queries as the scores' kernel multiplies them."""

    values: torch.Tensor  # [T, Hi, D]: the pool's float type; for fp8 pools e4m3, or float16 where there is no fp8
    weights: torch.Tensor  # [T, Hi] float32, the queries' scales in them


def quantize_queries(
    queries: torch.Tensor,  # [T, Hi, D]
    weights: torch.Tensor,  # [T, Hi] float32
    positions: torch.Tensor,  # [T] int32
    top_k: int,
    target: Target,
) -> Queries:
    """Queries in e4m3, by the rule of `index_cache.quantize_heads`, of the tokens that need scores."""
    num_tokens, num_heads, dim = queries.shape
    dtype = torch.float8_e4m3fn if target.has_fp8 else torch.float16
    values, scaled = torch.empty_like(queries, dtype=dtype), torch.empty_like(weights)
    quantize_index_queries[(num_tokens,)](
        queries,
        weights,
        positions,
        values.view(torch.uint8) if target.has_fp8 else values,
        scaled,
        top_k,
        **_constants(num_heads, dim, target),
        num_warps=_NUM_WARPS,
    )
    return Queries(values, scaled)


def padded(size: int, least: int) -> int:
    """The least power of two that has room for `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def _constants(num_heads: int, dim: int, target: Target) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "DIM": dim,
        "HAS_FP8": target.has_fp8,
        "BLOCK_HEADS": padded(num_heads, 1),
        "BLOCK_DIM": padded(dim, 1),
    }


@triton.jit(do_not_specialize=["top_k"])
def quantize_index_queries(
    queries,  # [T, Hi, D]
    weights,  # [T, Hi] float32
    positions,  # [T] int32
    values,  # [T, Hi, D] uint8, or float16 without fp8
    scaled_weights,  # [T, Hi] float32
    top_k,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_FP8: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program t: the heads of token t."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(positions + token) >= top_k:
        heads = tl.arange(0, BLOCK_HEADS)
        dims = tl.arange(0, BLOCK_DIM)
        places = (token * NUM_HEADS + heads)[:, None] * DIM + dims[None, :]
        is_there = (heads < NUM_HEADS)[:, None] & (dims < DIM)[None, :]
        x = tl.load(queries + places, mask=is_there, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(x), 1), LEAST_AMAX)
        scale = power_of_two_scale(tl.div_rn(largest, tl.full([BLOCK_HEADS], E4M3_LARGEST, tl.float32)))
        quantized = encode_e4m3(x / scale[:, None])  # a power of two: exact, however it is divided
        if HAS_FP8:
            tl.store(values + places, quantized, mask=is_there)
        else:
            tl.store(values + places, decode_e4m3(quantized).to(tl.float16), mask=is_there)
        head_places = token * NUM_HEADS + heads
        weight = tl.load(weights + head_places, mask=heads < NUM_HEADS, other=0.0)
        tl.store(scaled_weights + head_places, weight * scale, mask=heads < NUM_HEADS)


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2's 64 heads of 128; GLM-5 has 32."""
    for num_heads in (64, 32):
        yield Build(
            f"quantize index queries, {num_heads} heads",
            quantize_index_queries,
            {
                "queries": "*bf16",
                "weights": "*fp32",
                "positions": "*i32",
                "values": "*u8" if target.has_fp8 else "*fp16",
                "scaled_weights": "*fp32",
                "top_k": "i32",
            },
            _constants(num_heads, 128, target),
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
