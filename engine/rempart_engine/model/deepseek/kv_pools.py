"""What a DeepSeek model keeps per KV block: latent records of every layer, index keys of layers with an indexer."""

from typing import Literal

import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.latent_cache import LatentLayout
from rempart_engine.kv_storage import PoolShape
from rempart_engine.model.deepseek.config import DeepseekConfig

LATENTS = "latents"
INDEX_KEYS = "index_keys"

CacheDtype = torch.dtype | Literal["fp8"]


def kv_pools(config: DeepseekConfig, num_mtp_layers: int, dtype: CacheDtype) -> tuple[PoolShape, PoolShape]:
    """The two pools. An MTP layer's entries come last in both.

    Args:
        num_mtp_layers: those that are loaded.
        dtype: of the records: a float type, or "fp8" for the formats of `kernels.latent_cache` and `index_cache`.
    """
    num_layers = config.num_layers + num_mtp_layers
    num_indexers = sum(config.indexer.is_full) + num_mtp_layers
    key_dim = config.indexer.head_dim
    if dtype == "fp8":
        record = LatentLayout(config.kv_lora_rank, config.qk_rope_head_dim)
        return (
            PoolShape(LATENTS, num_layers, (BLOCK_SIZE, record.num_bytes), torch.uint8),
            PoolShape(INDEX_KEYS, num_indexers, (BLOCK_SIZE * (key_dim + 4),), torch.uint8),
        )
    return (
        PoolShape(LATENTS, num_layers, (BLOCK_SIZE, config.kv_lora_rank + config.qk_rope_head_dim), dtype),
        PoolShape(INDEX_KEYS, num_indexers, (BLOCK_SIZE, key_dim), dtype),
    )
