"""The latent cache of MLA: one record a token, that all heads share.

    float32, bfloat16   latent [R], rotary key [P]
    fp8                 latent [R] e4m3 | one float32 scale for each 128 of them | rotary key [P] bfloat16

The fp8 record is FlashMLA's: 656 bytes for R = 512 and P = 64. Its scales are powers of two, and the rotary key is not
quantized.
"""

from dataclasses import dataclass

import torch

from rempart_engine.kernels.fp8 import LARGEST, e4m3_bytes, power_of_two_scales

GROUP = 128
"""Latent values under one scale."""
LEAST_SCALE = 1e-4
"""A group of smaller numbers is held under the power of two from here on."""


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """Where the parts of an fp8 record lie, in bytes.

    Raises:
        ValueError: scales or rotary keys would not lie on their boundaries.
    """

    latent_dim: int
    rope_dim: int

    def __post_init__(self) -> None:
        if self.latent_dim % 4 or self.rope_dim % 2:
            raise ValueError(f"latent size must be a multiple of 4, rotary of 2: {self.latent_dim}, {self.rope_dim}")

    @property
    def num_groups(self) -> int:
        return -(-self.latent_dim // GROUP)

    @property
    def rope_start(self) -> int:
        return self.latent_dim + 4 * self.num_groups

    @property
    def num_bytes(self) -> int:
        return self.rope_start + 2 * self.rope_dim


def store_latents(
    latents: torch.Tensor,  # [T, R]
    rope_keys: torch.Tensor,  # [T, P], rotated
    slots: torch.Tensor,  # [T] int64
    pool: torch.Tensor,  # [N, 64, R + P] of a float type, or [N, 64, record bytes] uint8
) -> None:
    """Write one record per token.

    Raises:
        ValueError: shapes do not fit together.
    """
    records = (
        _fp8_records(latents, rope_keys)
        if pool.dtype == torch.uint8
        else torch.cat((latents, rope_keys), 1).to(pool.dtype)
    )
    if records.shape != (len(slots), pool.shape[2]):
        raise ValueError(f"records {tuple(records.shape)} do not fit pool {tuple(pool.shape)}")
    pool.view(-1, pool.shape[2]).index_copy_(0, slots, records)


def read_latents(
    pool: torch.Tensor, slots: torch.Tensor, latent_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [n, R], [n, P]
    """Latents and rotary keys of the slots [n], as float32."""
    records = pool.view(-1, pool.shape[2])[slots]
    if pool.dtype != torch.uint8:
        return records[:, :latent_dim].float(), records[:, latent_dim:].float()
    layout = _layout_of_record(pool.shape[2], latent_dim)
    latents = records[:, :latent_dim].view(torch.float8_e4m3fn).float()
    scales = records[:, latent_dim : layout.rope_start].contiguous().view(torch.float32)
    rope_keys = records[:, layout.rope_start :].contiguous().view(torch.bfloat16)
    return latents * scales.repeat_interleave(GROUP, 1)[:, :latent_dim], rope_keys.float()


def _fp8_records(latents: torch.Tensor, rope_keys: torch.Tensor) -> torch.Tensor:  # [T, record bytes] uint8
    layout = LatentLayout(latents.shape[1], rope_keys.shape[1])
    padding = layout.num_groups * GROUP - layout.latent_dim
    groups = torch.nn.functional.pad(latents.float(), (0, padding)).view(len(latents), -1, GROUP)
    scales = power_of_two_scales((groups.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE))
    values = e4m3_bytes(groups / scales[..., None]).flatten(1)[:, : layout.latent_dim]
    return torch.cat((values, scales.view(torch.uint8), rope_keys.bfloat16().contiguous().view(torch.uint8)), 1)


def _layout_of_record(num_bytes: int, latent_dim: int) -> LatentLayout:
    return LatentLayout(latent_dim, (num_bytes - LatentLayout(latent_dim, 0).num_bytes) // 2)
