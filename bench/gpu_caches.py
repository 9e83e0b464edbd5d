"""Pools full of random tokens on any device, and what new tokens bring: the inputs of one layer's attention."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from bench.gpu_work import Cache

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.index_cache import fp8_pages, quantize_heads, read_index_keys
from rempart_engine.kernels.latent_cache import read_latents, store_latents
from rempart_engine.kernels.rope import Angles
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kernels.select_tokens.reference import index_scores
from rempart_engine.kernels.store_latent_kv import IndexKeys
from rempart_engine.kernels.testing import make_step
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.kv_pools import kv_pools
from rempart_engine.model.deepseek.rotary import cos_sin_tables, softmax_scale

_TOKENS_AT_ONCE = 1 << 17
_KEY_EPS = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Of one layer."""

    shape: DeepseekConfig
    latents: torch.Tensor
    index_keys: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.latents.device

    @property
    def scale(self) -> float:
        return softmax_scale(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """What the layer's projections would make of T new tokens, and where they belong."""

    step: StepInputs
    latent_queries: torch.Tensor  # [T, H, R] bfloat16
    rope_queries: torch.Tensor  # [T, H, P]
    index_queries: torch.Tensor  # [T, Hi, D]
    index_weights: torch.Tensor  # [T, Hi] float32
    latents_and_rope: torch.Tensor  # [T, R + P]
    kv_norm: torch.Tensor  # [R] float32
    angles: Angles
    index_keys: IndexKeys


def fill_pools(shape: DeepseekConfig, cache: Cache, num_tokens: int, device: torch.device) -> Pools:
    """Pools in which every token has an index key of its own; latents repeat, for they decide nothing."""
    generator = torch.Generator(device).manual_seed(1)
    kinds = kv_pools(shape, 0, "fp8" if cache == "fp8" else torch.bfloat16)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    latents, index_keys = (
        torch.empty(num_blocks, *kind.block_shape, dtype=kind.dtype, device=device) for kind in kinds
    )
    blocks_at_once = min(_TOKENS_AT_ONCE // BLOCK_SIZE, num_blocks)

    def draw(width: int) -> torch.Tensor:  # [tokens, width] float32
        return torch.randn(blocks_at_once * BLOCK_SIZE, width, generator=generator, device=device)

    slots = torch.arange(blocks_at_once * BLOCK_SIZE, device=device)
    store_latents(draw(shape.kv_lora_rank).bfloat16(), draw(shape.qk_rope_head_dim).bfloat16(), slots, latents)
    for start in range(0, num_blocks, blocks_at_once):
        number = min(blocks_at_once, num_blocks - start)
        if start:
            latents[start : start + number] = latents[:number]
        keys = draw(shape.indexer.head_dim).view(-1, BLOCK_SIZE, shape.indexer.head_dim)[:number]
        _write_keys(keys, index_keys[start : start + number])
    return Pools(shape, latents, index_keys)


def _write_keys(keys: torch.Tensor, pages: torch.Tensor) -> None:  # [n, 64, D] float32, n pages of the pool
    if pages.dtype != torch.uint8:
        pages.copy_(keys)
        return
    values, scales = fp8_pages(pages, keys.shape[2])
    quantized, its_scales = quantize_heads(keys)
    values.copy_(quantized)
    scales.copy_(its_scales)


def room(num_sequences: int, context: int) -> int:
    """Tokens that blocks of so many sequences hold."""
    return num_sequences * -(-context // BLOCK_SIZE) * BLOCK_SIZE


def new_tokens(pools: Pools, lengths: list[tuple[int, int]]) -> NewTokens:
    """For sequences given by context and number of new tokens, with their blocks all over the pools."""
    shape, device = pools.shape, pools.device
    generator = torch.Generator(device).manual_seed(2)
    step = on_device(make_step(lengths, len(pools.latents)), device)
    num_tokens, indexer = len(step.positions), shape.indexer

    def draw(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    tables = [table.to(device) for table in cos_sin_tables(shape, step.max_context)]
    cos, sin = (table[step.positions.long()] for table in tables)
    return NewTokens(
        step,
        latent_queries=draw(num_tokens, shape.num_heads, shape.kv_lora_rank),
        rope_queries=draw(num_tokens, shape.num_heads, shape.qk_rope_head_dim),
        index_queries=draw(num_tokens, indexer.num_heads, indexer.head_dim),
        index_weights=draw(num_tokens, indexer.num_heads, dtype=torch.float32),
        latents_and_rope=draw(num_tokens, shape.kv_lora_rank + shape.qk_rope_head_dim),
        kv_norm=torch.ones(shape.kv_lora_rank, device=device),
        angles=(cos, sin),
        index_keys=IndexKeys(
            draw(num_tokens, indexer.head_dim),
            torch.ones(indexer.head_dim, device=device),
            torch.zeros(indexer.head_dim, device=device),
            _KEY_EPS,
            indexer.rope,
        ),
    )


def on_device(step: StepInputs, device: torch.device) -> StepInputs:
    """The same step with its tensors there."""
    parts = {spec.name: getattr(step, spec.name) for spec in fields(step)}
    moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items() if isinstance(part, torch.Tensor)}
    return replace(step, **moved)


def random_selection(new: NewTokens, top_k: int) -> Selection:
    """For each token as many positions of its own context as attention may see, anywhere in it."""
    step = new.step
    if step.max_context <= top_k:
        return Selection.of_everything(step)
    generator = torch.Generator(step.positions.device).manual_seed(6)
    places = torch.arange(step.max_context, device=step.positions.device)
    rows = []
    for positions in torch.split(step.positions, max(1, (1 << 28) // step.max_context)):
        ranks = torch.rand(len(positions), step.max_context, generator=generator, device=positions.device)
        ranks.masked_fill_(places > positions[:, None], -1.0)
        rows.append(ranks.topk(top_k).indices.sort().values.to(torch.int32))
    counts = (step.positions + 1).clamp(max=top_k)
    chosen = torch.cat(rows)
    return Selection(chosen.masked_fill(torch.arange(top_k, device=chosen.device) >= counts[:, None], -1), counts)


def slots_of(step: StepInputs, token: int) -> torch.Tensor:  # [S]
    """Where all that the token sees lies, in order."""
    places = torch.arange(int(step.positions[token]) + 1, device=step.positions.device)
    table = step.block_tables[int(step.token_rows[token])].long()
    return table[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE


def expected_scores(pools: Pools, new: NewTokens, token: int) -> torch.Tensor:  # [S] float32
    """What the indexer's scores of one token mean."""
    queries = new.index_queries[token]
    if pools.index_keys.dtype == torch.uint8:
        values, scales = quantize_heads(queries)
        queries = values.view(torch.float8_e4m3fn).float() * scales[:, None]
    keys = read_index_keys(pools.index_keys, slots_of(new.step, token), pools.shape.indexer.head_dim)
    return index_scores(queries, new.index_weights[token], keys)


def expected_attention(pools: Pools, new: NewTokens, selection: Selection, token: int) -> torch.Tensor:  # [H, R]
    """What attention of one token means, in float32."""
    slots, count = slots_of(new.step, token), int(selection.counts[token])
    if count < len(slots):
        slots = slots[selection.positions[token, :count].long()]
    latents, rope_keys = read_latents(pools.latents, slots, pools.shape.kv_lora_rank)
    found = new.latent_queries[token].float() @ latents.T + new.rope_queries[token].float() @ rope_keys.T
    return (found * pools.scale).softmax(-1) @ latents
