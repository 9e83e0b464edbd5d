"""All that a layer caches of a token, in one launch: a program for latent and rotary key, and one for the index key.

They are apart because each is a chain of sums over its row, and at decode there are more multiprocessors than tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.fp8 import LARGEST
from rempart_engine.kernels.index_cache.cpu import LEAST_AMAX
from rempart_engine.kernels.latent_cache import GROUP, LEAST_SCALE
from rempart_engine.kernels.rms_norm.kernel import norm_factor
from rempart_engine.kernels.rope import Angles
from rempart_engine.kernels.store_latent_kv import IndexKeys
from rempart_engine.kernels.target import Target
from rempart_engine.kernels.triton_scalars import cast, encode_e4m3, power_of_two_scale

_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_GROUP = tl.constexpr(GROUP)
_LARGEST = tl.constexpr(LARGEST)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_LEAST_AMAX = tl.constexpr(float(LEAST_AMAX))

_NUM_WARPS = 4
"""One for each group of a latent of 512: a group's largest number is found within its warp."""


@triton.jit
def _pair(dim, ROPE_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """For rotary dimensions: the other of the pair, the pair's angle, and whether this is the pair's first."""
    if IS_INTERLEAVED:
        return dim ^ 1, dim // 2, dim % 2 == 0
    HALF: tl.constexpr = ROPE_DIM // 2
    is_first = dim < HALF
    return tl.where(is_first, dim + HALF, dim - HALF), tl.where(is_first, dim, dim - HALF), is_first


@triton.jit
def _turned(number, other, angle, is_first, is_turned, cos_ptr, sin_ptr):
    """A number of a pair after the rotation; one that is not turned stays."""
    cos = tl.load(cos_ptr + angle, mask=is_turned, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=is_turned, other=0.0)
    return tl.where(is_turned, number * cos + other * tl.where(is_first, -sin, sin), number)


@triton.jit
def _sizes(numbers):
    """Magnitudes, for the largest of them; NaN has none, and stays itself under whatever scale."""
    return tl.where(numbers == numbers, tl.abs(numbers), 0.0)


@triton.jit
def _quantized(numbers, scale):
    """e4m3 bytes of numbers over a scale, which is a power of two: the product with its inverse is exact."""
    return encode_e4m3(numbers * tl.div_rn(1.0, scale))


@triton.jit
def _store_latent(
    x_ptr,  # [R + P], of one token
    norm_ptr,
    eps,
    cos_ptr,  # [P / 2], of one token
    sin_ptr,
    slot,
    pool_ptr,
    scales_ptr,
    rope_keys_ptr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    group = tl.arange(0, GROUPS)
    dim = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    is_inside = dim < LATENT_DIM
    rope_dim = tl.arange(0, ROPE_BLOCK)
    is_turned = rope_dim < ROPE_DIM
    partner, angle, is_first = _pair(rope_dim, ROPE_DIM, True)
    numbers = tl.load(x_ptr + dim, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + dim, mask=is_inside, other=0.0)
    rope_key = tl.load(x_ptr + LATENT_DIM + rope_dim, mask=is_turned, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + LATENT_DIM + partner, mask=is_turned, other=0.0).to(tl.float32)

    factor = norm_factor(tl.sum(numbers * numbers), eps, LATENT_DIM)
    latent = cast(numbers * factor * weight, dtype).to(tl.float32)
    rope_key = cast(_turned(rope_key, other, angle, is_first, is_turned, cos_ptr, sin_ptr), dtype).to(tl.float32)
    if scales_ptr is None:
        at = pool_ptr + slot * (LATENT_DIM + ROPE_DIM)
        pool_dtype: tl.constexpr = pool_ptr.dtype.element_ty
        tl.store(at + dim, cast(latent, pool_dtype), mask=is_inside)
        tl.store(at + LATENT_DIM + rope_dim, cast(rope_key, pool_dtype), mask=is_turned)
    else:
        NUM_GROUPS: tl.constexpr = (LATENT_DIM + _GROUP - 1) // _GROUP
        ROPE_START: tl.constexpr = LATENT_DIM + 4 * NUM_GROUPS
        RECORD: tl.constexpr = ROPE_START + 2 * ROPE_DIM
        largest = tl.max(_sizes(latent), axis=1)
        scale = power_of_two_scale(tl.maximum(tl.div_rn(largest, _LARGEST), _LEAST_SCALE))
        tl.store(pool_ptr + slot * RECORD + dim, _quantized(latent, scale[:, None]), mask=is_inside)
        tl.store(scales_ptr + (slot * RECORD + LATENT_DIM) // 4 + group, scale, mask=group < NUM_GROUPS)
        rope_keys_ptr += (slot * RECORD + ROPE_START) // 2
        tl.store(rope_keys_ptr + rope_dim, cast(rope_key, tl.bfloat16), mask=is_turned)


@triton.jit
def _normed(raw_ptr, weight_ptr, bias_ptr, dim, is_inside, mean, factor):
    number = tl.load(raw_ptr + dim, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dim, mask=is_inside, other=0.0)
    bias = tl.load(bias_ptr + dim, mask=is_inside, other=0.0)
    return (number - mean) * factor * weight + bias


@triton.jit
def _store_index_key(
    raw_ptr,  # [D], of one token
    weight_ptr,
    bias_ptr,
    eps,
    cos_ptr,  # [P / 2], of one token
    sin_ptr,
    slot,
    pool_ptr,
    scales_ptr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    dim = tl.arange(0, BLOCK)
    is_inside = dim < DIM
    is_turned = dim < ROPE_DIM
    partner, angle, is_first = _pair(dim, ROPE_DIM, IS_INTERLEAVED)
    number = tl.load(raw_ptr + dim, mask=is_inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(number), DIM * 1.0)
    centered = tl.where(is_inside, number - mean, 0.0)
    factor = norm_factor(tl.sum(centered * centered), eps, DIM)
    key = _normed(raw_ptr, weight_ptr, bias_ptr, dim, is_inside, mean, factor)
    other = _normed(raw_ptr, weight_ptr, bias_ptr, partner, is_turned, mean, factor)
    key = _turned(key, other, angle, is_first, is_turned, cos_ptr, sin_ptr)
    if scales_ptr is None:
        tl.store(pool_ptr + slot * DIM + dim, cast(key, pool_ptr.dtype.element_ty), mask=is_inside)
    else:
        PAGE: tl.constexpr = _BLOCK_SIZE * (DIM + 4)
        block, offset = slot // _BLOCK_SIZE, slot % _BLOCK_SIZE
        largest = tl.max(_sizes(key))  # beyond the key are zeros
        scale = power_of_two_scale(tl.div_rn(tl.maximum(largest, _LEAST_AMAX), _LARGEST))
        tl.store(pool_ptr + block * PAGE + offset * DIM + dim, _quantized(key, scale), mask=is_inside)
        tl.store(scales_ptr + (block * PAGE + _BLOCK_SIZE * DIM) // 4 + offset, scale)


@triton.jit
def _store_latent_kv(
    x_ptr,  # [T, R + P]
    kv_norm_ptr,  # [R]
    kv_eps,
    cos_ptr,  # [T, P / 2]
    sin_ptr,
    slots_ptr,  # [T]
    latent_pool_ptr,  # [N, 64, R + P], or records of bytes
    latent_scales_ptr,  # the same memory as float32, or None
    rope_keys_ptr,  # the same memory as bfloat16, or None
    raw_ptr,  # [T, D], and all that follows, or None
    norm_weight_ptr,  # [D]
    norm_bias_ptr,
    key_eps,
    index_pool_ptr,  # [N, 64, D], or pages of bytes
    index_scales_ptr,  # the same memory as float32, or None
    x_stride,
    raw_stride,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    cos_ptr += token * (ROPE_DIM // 2)
    sin_ptr += token * (ROPE_DIM // 2)
    if slot >= 0:
        if tl.program_id(1) == 0:
            _store_latent(
                x_ptr + token * x_stride, kv_norm_ptr, kv_eps, cos_ptr, sin_ptr, slot,
                latent_pool_ptr, latent_scales_ptr, rope_keys_ptr, LATENT_DIM, ROPE_DIM, GROUPS, ROPE_BLOCK,
            )  # fmt: skip
        elif raw_ptr is not None:
            _store_index_key(
                raw_ptr + token * raw_stride, norm_weight_ptr, norm_bias_ptr, key_eps, cos_ptr, sin_ptr, slot,
                index_pool_ptr, index_scales_ptr, KEY_DIM, KEY_BLOCK, ROPE_DIM, IS_INTERLEAVED,
            )  # fmt: skip


def store_latent_kv(
    latents_and_rope: torch.Tensor,  # [T, R + P]
    kv_norm: torch.Tensor,  # [R]
    kv_eps: float,
    angles: Angles,
    slots: torch.Tensor,  # [T]
    latent_pool: torch.Tensor,  # [N, 64, R + P] or [N, 64, record bytes] uint8
    keys: IndexKeys | None,
    index_pool: torch.Tensor | None,  # [N, 64, D] or [N, 64 (D + 4)] uint8
) -> None:
    """Norm, rotate and store; slot -1: nothing."""
    key_dim, is_interleaved = (0, False) if keys is None else (keys.raw.shape[1], keys.layout == "interleaved")
    config = _config(len(kv_norm), 2 * angles[0].shape[1], key_dim, is_interleaved)
    is_fp8 = latent_pool.dtype == torch.uint8
    latent_pools = (
        latent_pool,
        latent_pool.view(torch.float32) if is_fp8 else None,
        latent_pool.view(torch.bfloat16) if is_fp8 else None,
    )
    index: tuple[Any, ...] = (None, None, None, None, None, None)
    if keys is not None and index_pool is not None:
        scales = index_pool.view(torch.float32) if index_pool.dtype == torch.uint8 else None
        index = (keys.raw, keys.norm_weight, keys.norm_bias, keys.eps, index_pool, scales)
    _store_latent_kv[(len(slots), 1 if keys is None else 2)](
        latents_and_rope,
        kv_norm,
        kv_eps,
        *angles,
        slots,
        *latent_pools,
        *index,
        latents_and_rope.stride(0),
        0 if keys is None else keys.raw.stride(0),
        **config,
        num_warps=_NUM_WARPS,
        num_stages=1,
    )


def _config(latent_dim: int, rope_dim: int, key_dim: int, is_interleaved: bool) -> dict[str, Any]:
    return {
        "LATENT_DIM": latent_dim,
        "ROPE_DIM": rope_dim,
        "GROUPS": triton.next_power_of_2(triton.cdiv(latent_dim, GROUP)),
        "ROPE_BLOCK": triton.next_power_of_2(rope_dim),
        "KEY_DIM": key_dim,
        "KEY_BLOCK": triton.next_power_of_2(key_dim),
        "IS_INTERLEAVED": is_interleaved,
    }


def builds(target: Target) -> Iterator[Build]:
    """DeepSeek-V3.2, its relative with interleaved index keys, and a layer that shares another's choice of tokens."""
    for cache in ("bf16", "fp8"):
        for key_dim, layout in ((128, "half-split"), (128, "interleaved"), (0, "")):
            types, nothing = _pointers(cache, has_keys=key_dim > 0)
            strides = {"x_stride": "i32", "raw_stride": "i32"}
            epsilons = {"kv_eps": "fp32"} | ({"key_eps": "fp32"} if key_dim else {})
            yield Build(
                name=f"{cache} cache, {f'{layout} keys' if key_dim else 'no keys'}",
                kernel=_store_latent_kv,
                arguments=types | epsilons | strides,
                constants=_config(512, 64, key_dim, layout == "interleaved") | dict.fromkeys(nothing),
                num_warps=_NUM_WARPS,
                num_stages=1,
                aligned=frozenset((*types, *strides)),
            )


def _pointers(cache: str, has_keys: bool) -> tuple[dict[str, str], list[str]]:
    """Types of the pointers of a launch, and the names of the arguments that are None."""
    types = dict.fromkeys(("x_ptr", "latent_pool_ptr", "raw_ptr", "index_pool_ptr"), "*bf16")
    types |= dict.fromkeys(("kv_norm_ptr", "cos_ptr", "sin_ptr", "norm_weight_ptr", "norm_bias_ptr"), "*fp32")
    types |= {"slots_ptr": "*i64", "latent_scales_ptr": "*fp32", "rope_keys_ptr": "*bf16", "index_scales_ptr": "*fp32"}
    nothing = []
    if cache == "fp8":
        types |= {"latent_pool_ptr": "*u8", "index_pool_ptr": "*u8"}
    else:
        nothing += ["latent_scales_ptr", "rope_keys_ptr", "index_scales_ptr"]
    if not has_keys:
        nothing += ["raw_ptr", "norm_weight_ptr", "norm_bias_ptr", "key_eps", "index_pool_ptr", "index_scales_ptr"]
    return {name: type_ for name, type_ in types.items() if name not in nothing}, nothing
