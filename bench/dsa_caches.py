"""Caches full of random tokens, and what new tokens bring: the inputs of one layer's attention."""

from dataclasses import dataclass

import torch
from bench.dsa_points import V32, Cache

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.index_cache import store_index_keys
from rempart_engine.kernels.latent_cache import store_latents
from rempart_engine.kernels.testing import make_step
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.kv_pools import INDEX_KEYS, LATENTS, kv_pools
from rempart_engine.model.deepseek.rotary import softmax_scale

SCALE = softmax_scale(V32)
_TOKENS_AT_ONCE = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class Caches:
    """The pools of one layer."""

    latents: torch.Tensor
    index_keys: torch.Tensor
    dtype: torch.dtype
    """Of queries, and of what attention returns."""

    @property
    def num_blocks(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """What the layer's projections would make of T new tokens, and where they belong."""

    step: StepInputs
    latent_queries: torch.Tensor  # [T, H, R]
    rope_queries: torch.Tensor  # [T, H, P]
    index_queries: torch.Tensor  # [T, Hi, D]
    index_weights: torch.Tensor  # [T, Hi] float32
    index_keys: torch.Tensor  # [T, D]


def fill_caches(cache: Cache, num_tokens: int) -> Caches:
    """Pools in which every token has numbers of its own; 1.4 KB a token in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if cache == "float32" else torch.bfloat16
    shapes = kv_pools(V32, 0, "fp8" if cache == "fp8" else dtype)
    one_layer = [type(shape)(shape.name, 1, shape.block_shape, shape.dtype) for shape in shapes]
    storage = KVStorage(one_layer, -(-num_tokens // BLOCK_SIZE))
    caches = Caches(storage.layer(LATENTS, 0), storage.layer(INDEX_KEYS, 0), dtype)
    for start in range(0, num_tokens, _TOKENS_AT_ONCE):
        slots = torch.arange(start, min(start + _TOKENS_AT_ONCE, num_tokens))
        keys = torch.randn(len(slots), V32.indexer.head_dim, generator=generator)
        store_index_keys(keys, slots, caches.index_keys)
        if start == 0:
            latents = torch.randn(len(slots), V32.kv_lora_rank, generator=generator)
            rope_keys = torch.randn(len(slots), V32.qk_rope_head_dim, generator=generator)
        # Only index keys decide what is chosen, so only they must differ; drawing latents would take a minute.
        store_latents(
            latents.roll(start // _TOKENS_AT_ONCE, 1)[: len(slots)], rope_keys[: len(slots)], slots, caches.latents
        )
    return caches


def new_tokens(caches: Caches, lengths: list[tuple[int, int]]) -> NewTokens:
    """For sequences given by context and number of new tokens, with their blocks all over the pools."""
    generator = torch.Generator().manual_seed(2)
    step = make_step(lengths, caches.num_blocks)
    num_tokens, indexer = len(step.positions), V32.indexer

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(num_tokens, *shape, generator=generator)

    return NewTokens(
        step,
        latent_queries=draw(V32.num_heads, V32.kv_lora_rank).to(caches.dtype),
        rope_queries=draw(V32.num_heads, V32.qk_rope_head_dim).to(caches.dtype),
        index_queries=draw(indexer.num_heads, indexer.head_dim).to(caches.dtype),
        index_weights=draw(indexer.num_heads) * (indexer.num_heads * indexer.head_dim) ** -0.5,
        index_keys=draw(indexer.head_dim).to(caches.dtype),
    )


def slots_of(step: StepInputs, token: int) -> torch.Tensor:
    """Where everything that a token may see lies, in the order of positions."""
    places = torch.arange(int(step.positions[token]) + 1)
    return step.block_tables[step.token_rows[token]].long()[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
