"""What caching a token means, from the references of its steps."""

import torch

from rempart_engine.kernels.index_cache import store_index_keys
from rempart_engine.kernels.latent_cache import store_latents
from rempart_engine.kernels.rms_norm.reference import add_rms_norm
from rempart_engine.kernels.rope import Angles
from rempart_engine.kernels.rope.reference import rotate
from rempart_engine.kernels.store_latent_kv import IndexKeys


def store_latent_kv(
    latents_and_rope: torch.Tensor,  # [T, R + P]
    kv_norm: torch.Tensor,  # [R]
    kv_eps: float,
    angles: Angles,
    slots: torch.Tensor,  # [T]; -1: none
    latent_pool: torch.Tensor,
    keys: IndexKeys | None,
    index_pool: torch.Tensor | None,
) -> None:
    """DeepSeek-V2, equations 9 and 15, and the index key of DeepSeek-V3.2, in the pools' formats."""
    latents, rope_keys = latents_and_rope.tensor_split([len(kv_norm)], dim=1)
    latents = add_rms_norm(torch.zeros(latents.shape), latents, kv_norm, kv_eps)
    rope_keys = rotate(rope_keys[:, None], *angles, is_interleaved=True)[:, 0]
    is_kept = slots >= 0
    store_latents(latents[is_kept], rope_keys[is_kept], slots[is_kept], latent_pool)
    if keys is None or index_pool is None:
        return
    normed = torch.nn.functional.layer_norm(
        keys.raw.float(), keys.norm_weight.shape, keys.norm_weight, keys.norm_bias, keys.eps
    )
    turned = rotate(normed[:, None], *angles, is_interleaved=keys.layout == "interleaved")[:, 0]
    store_index_keys(turned[is_kept], slots[is_kept], index_pool)
