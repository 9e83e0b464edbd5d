"""What a layer of DeepSeek's caches of a token: its latent with the rotary key, and its index key."""

from dataclasses import dataclass

import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.index_cache import fp8_pages, store_index_keys
from rempart_engine.kernels.latent_cache import LatentLayout, store_latents
from rempart_engine.kernels.rms_norm import rms_norm
from rempart_engine.kernels.rope import Angles, RopeLayout, check_angles, rotate
from rempart_engine.kernels.target import runs_triton


@dataclass(frozen=True, slots=True)
class IndexKeys:
    """Index keys as their projection gives them, and what is done to them: a layer norm, then a rotation."""

    raw: torch.Tensor  # [T, D]
    norm_weight: torch.Tensor  # [D] float32
    norm_bias: torch.Tensor  # [D] float32
    eps: float
    layout: RopeLayout


def store_latent_kv(
    latents_and_rope: torch.Tensor,  # [T, R + P], rows may lie apart
    kv_norm: torch.Tensor,  # [R] float32
    kv_eps: float,
    angles: Angles,
    slots: torch.Tensor,  # [T] int64; on a GPU, -1 stands for none
    latent_pool: torch.Tensor,  # as kernels/latent_cache has it
    keys: IndexKeys | None,
    index_pool: torch.Tensor | None,  # as kernels/index_cache has it
) -> None:
    """Norm, rotate and store. A latent is rounded to its projection's type before it is quantized, a key is not.

    Raises:
        ValueError: shapes or types do not fit together, or there are keys without a pool or the other way round.
    """
    _check_latents(latents_and_rope, kv_norm, angles, slots, latent_pool)
    if (keys is None) != (index_pool is None):
        raise ValueError("index keys and a pool for them come together")
    if keys is not None and index_pool is not None:
        _check_keys(keys, angles, slots, index_pool)
    if runs_triton(latents_and_rope):
        from rempart_engine.kernels.store_latent_kv.kernel import store_latent_kv as on_gpu

        on_gpu(latents_and_rope, kv_norm, kv_eps, angles, slots, latent_pool, keys, index_pool)
        return
    latents, rope_keys = latents_and_rope.split((len(kv_norm), 2 * angles[0].shape[1]), dim=-1)
    latents = rms_norm(latents.contiguous(), kv_norm, kv_eps)
    store_latents(latents, rotate(rope_keys[:, None], angles, "interleaved")[:, 0], slots, latent_pool)
    if keys is not None and index_pool is not None:
        normed = torch.nn.functional.layer_norm(
            keys.raw.float(), (keys.raw.shape[1],), keys.norm_weight, keys.norm_bias, keys.eps
        )
        store_index_keys(rotate(normed[:, None], angles, keys.layout)[:, 0], slots, index_pool)


def _check_latents(
    latents_and_rope: torch.Tensor, kv_norm: torch.Tensor, angles: Angles, slots: torch.Tensor, pool: torch.Tensor
) -> None:
    check_angles(latents_and_rope, angles)
    latent_dim, rope_dim = len(kv_norm), 2 * angles[0].shape[1]
    if latents_and_rope.shape[1:] != (latent_dim + rope_dim,):
        raise ValueError(f"{tuple(latents_and_rope.shape)} is not a latent of {latent_dim} and a key of {rope_dim}")
    _check_floats(kv_norm, (latent_dim,))
    if slots.shape != latents_and_rope.shape[:1] or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"one int64 slot a token: {slots.dtype} {tuple(slots.shape)}, {len(latents_and_rope)} tokens")
    is_fp8 = pool.dtype == torch.uint8
    record = LatentLayout(latent_dim, rope_dim).num_bytes if is_fp8 else latent_dim + rope_dim
    if pool.shape[1:] != (BLOCK_SIZE, record) or not pool.is_contiguous():
        raise ValueError(f"records of {record} do not fit pool {tuple(pool.shape)} of strides {pool.stride()}")


def _check_keys(keys: IndexKeys, angles: Angles, slots: torch.Tensor, pool: torch.Tensor) -> None:
    check_angles(keys.raw, angles)
    if keys.raw.dim() != 2 or len(keys.raw) != len(slots):
        raise ValueError(f"index keys {tuple(keys.raw.shape)} are not of {len(slots)} tokens")
    dim = keys.raw.shape[1]
    _check_floats(keys.norm_weight, (dim,))
    _check_floats(keys.norm_bias, (dim,))
    if not pool.is_contiguous():
        raise ValueError(f"a pool without gaps is taken, not one of strides {pool.stride()}")
    if pool.dtype == torch.uint8:
        fp8_pages(pool, dim)
    elif pool.shape[1:] != (BLOCK_SIZE, dim):
        raise ValueError(f"index keys of {dim} do not fit pool {tuple(pool.shape)}")


def _check_floats(numbers: torch.Tensor, shape: tuple[int, ...]) -> None:
    if numbers.shape != shape or numbers.dtype != torch.float32 or not numbers.is_contiguous():
        raise ValueError(f"float32 {shape} without gaps is taken, not {numbers.dtype} {tuple(numbers.shape)}")
