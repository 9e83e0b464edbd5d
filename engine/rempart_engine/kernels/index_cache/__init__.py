"""The indexer's key cache: one key a token.

    float32, bfloat16   pages [64, D]
    fp8                 pages of 64 * (D + 4) bytes: 64 e4m3 keys, then 64 float32 scales (DeepGEMM's planar page)

An fp8 key has one scale, a power of two: 132 bytes a token for D = 128.
"""

import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.fp8 import LARGEST, e4m3_bytes, power_of_two_scales
from rempart_engine.kernels.index_cache.cpu import LEAST_AMAX, store_fp8_keys


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] as e4m3 bytes [..., D] and scales float32 [...]: the rule for index keys and index queries alike."""
    x = x.float()
    scales = power_of_two_scales(x.abs().amax(-1).clamp(min=float(LEAST_AMAX)) / LARGEST)
    return e4m3_bytes(x / scales[..., None]), scales


def store_index_keys(
    keys: torch.Tensor,  # [T, D]
    slots: torch.Tensor,  # [T] int64
    pool: torch.Tensor,  # [N, 64, D] of a float type, or [N, 64 * (D + 4)] uint8
) -> None:
    """Write one key per token.

    Raises:
        ValueError: shapes do not fit together.
    """
    dim = keys.shape[1]
    if pool.dtype != torch.uint8:
        if pool.shape[1:] != (BLOCK_SIZE, dim):
            raise ValueError(f"keys {tuple(keys.shape)} do not fit pool {tuple(pool.shape)}")
        pool.view(-1, dim).index_copy_(0, slots, keys.to(pool.dtype))
        return
    fp8_pages(pool, dim)
    store_fp8_keys(keys.float().contiguous().numpy(), slots.numpy(), pool.numpy(), pool.view(torch.float32).numpy())


def read_index_keys(pool: torch.Tensor, slots: torch.Tensor, dim: int) -> torch.Tensor:  # [n, D]
    """Keys of the slots [n], as float32."""
    if pool.dtype != torch.uint8:
        return pool.view(-1, dim)[slots].float()
    at = (slots // BLOCK_SIZE, slots % BLOCK_SIZE)
    value_pages, scale_pages = fp8_pages(pool, dim)
    return value_pages[at].view(torch.float8_e4m3fn).float() * scale_pages[at][:, None]


def fp8_pages(pool: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool's keys [N, 64, D] uint8 and scales [N, 64] float32, as views.

    Raises:
        ValueError: the pool has no such pages.
    """
    if pool.shape[1:] != (BLOCK_SIZE * (dim + 4),):
        raise ValueError(f"a page of keys of {dim} has {BLOCK_SIZE * (dim + 4)} bytes, got {tuple(pool.shape)}")
    keys = pool[:, : BLOCK_SIZE * dim].unflatten(1, (BLOCK_SIZE, dim))
    return keys, pool[:, BLOCK_SIZE * dim :].view(torch.float32)
