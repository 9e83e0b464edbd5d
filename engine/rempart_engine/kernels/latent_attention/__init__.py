"""MLA in its absorbed form: all heads attend to one latent record a token, chosen ones or all."""

import numpy as np
import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.cpu_tiles import TILE_COLUMNS, has_bfloat16_dot
from rempart_engine.kernels.latent_attention.cpu import kernel_for
from rempart_engine.kernels.latent_cache import LatentLayout
from rempart_engine.kernels.packing import columns_of_heads
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kernels.target import runs_triton


def latent_attention(
    latent_queries: torch.Tensor,  # [T, H, R]
    rope_queries: torch.Tensor,  # [T, H, P], rotated
    pool: torch.Tensor,  # [N, 64, R + P] of the queries' type, or [N, 64, record bytes] uint8
    step: StepInputs,
    selection: Selection,
    scale: float,
) -> torch.Tensor:  # [T, H, R]
    """Softmax of scale * (latent query . latent + rotary query . rotary key) over the chosen tokens, times latents.

    Raises:
        ValueError: shapes, types or strides do not fit together.
    """
    num_tokens, num_heads, latent_dim = latent_queries.shape
    rope_dim = rope_queries.shape[2]
    is_fp8 = pool.dtype == torch.uint8
    if pool.shape[2] != (LatentLayout(latent_dim, rope_dim).num_bytes if is_fp8 else latent_dim + rope_dim):
        raise ValueError(f"pool {tuple(pool.shape)} does not fit latents of {latent_dim} and rotary keys of {rope_dim}")
    if not is_fp8 and pool.dtype != latent_queries.dtype:
        raise ValueError(f"types differ: {latent_queries.dtype}, {pool.dtype}")
    _check(latent_queries, rope_queries, pool, selection)
    if runs_triton(latent_queries):
        from rempart_engine.kernels.latent_attention.kernel import latent_attention as on_gpu

        return on_gpu(latent_queries, rope_queries, pool, step, selection, scale)
    in_bfloat16 = has_bfloat16_dot() and latent_dim % 2 == rope_dim % 2 == 0 and latent_queries.dtype == torch.bfloat16
    records = as_array(pool)
    # A short step has few pieces of work: smaller groups of heads, so that every thread gets some.
    group = 2 * TILE_COLUMNS if num_tokens * num_heads > 2 * TILE_COLUMNS * torch.get_num_threads() else TILE_COLUMNS
    out = torch.empty(num_tokens, num_heads, latent_dim, dtype=latent_queries.dtype)
    kernel_for(latent_dim, rope_dim, is_fp8=is_fp8, in_bfloat16=in_bfloat16)(
        columns_of_heads(torch.cat((latent_queries, rope_queries), -1), group, in_pairs=in_bfloat16),
        records.view(np.uint32) if in_bfloat16 and not is_fp8 else records,
        records.view(np.float32) if is_fp8 else np.empty((*records.shape[:2], 1), np.float32),
        records.view(np.uint16) if is_fp8 else np.empty((*records.shape[:2], 1), np.uint16),
        step.block_tables.numpy(),
        step.token_rows.numpy(),
        step.positions.numpy(),
        selection.positions.numpy(),
        selection.counts.numpy(),
        np.float32(scale),
        torch.get_num_threads(),
        as_array(out),
    )
    return out


def _check(latent_queries: torch.Tensor, rope_queries: torch.Tensor, pool: torch.Tensor, selection: Selection) -> None:
    num_tokens = len(latent_queries)
    if latent_queries.shape[:2] != rope_queries.shape[:2] or latent_queries.dtype != rope_queries.dtype:
        raise ValueError(
            f"queries differ: {tuple(latent_queries.shape)} of {latent_queries.dtype}, "
            f"{tuple(rope_queries.shape)} of {rope_queries.dtype}"
        )
    if len(selection.positions) != num_tokens or selection.counts.shape != (num_tokens,):
        raise ValueError(
            f"{num_tokens} tokens, but choices {tuple(selection.positions.shape)}, {tuple(selection.counts.shape)}"
        )
    if not selection.positions.dtype == selection.counts.dtype == torch.int32:
        raise ValueError(f"choices must be int32: {selection.positions.dtype}, {selection.counts.dtype}")
    if pool.shape[1] != BLOCK_SIZE or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)} with strides {pool.stride()} is not one of whole blocks")
    if not selection.positions.is_contiguous():
        raise ValueError(f"choices must be contiguous, strides are {selection.positions.stride()}")
    if latent_queries.stride(2) != 1 or rope_queries.stride(2) != 1:
        raise ValueError(f"heads must be contiguous, strides are {latent_queries.stride()}, {rope_queries.stride()}")
