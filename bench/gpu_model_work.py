"""What a decode step of DeepSeek-V3.2 costs at least, part by part, and the whole model from a slice of it. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import gpu_work
from bench.gpu_points import Aim
from bench.gpu_work import Cache, Work, Works

from rempart_engine.model.deepseek.config import DeepseekConfig

STEP_AIM = Aim("1.5 times the floor", times_floor=1.5)
NUM_GPUS = 8
LINK_BYTES_PER_S = 450e9
"""Of NVLink from one H100 or H200 to the others, each way, as published."""


def decode_works(config: DeepseekConfig, batch: int, context: int, cache: Cache) -> Works:
    """Every part of a step that computes one token of each sequence, one after the other."""
    parts: list[Work] = []
    for layer in range(config.num_layers):
        parts += _attention(config, batch, context, cache)
        parts += _dense(config, batch) if layer < config.num_dense_layers else _mixture(config, batch)
    return (
        *parts,
        _bfloat16(batch, config.hidden_size, config.vocab_size),
        gpu_work.sampling(batch, config.vocab_size),
    )


def _attention(config: DeepseekConfig, batch: int, context: int, cache: Cache) -> Iterator[Work]:
    width, heads, indexer = config.hidden_size, config.num_heads, config.indexer
    query_width = config.qk_nope_head_dim + config.qk_rope_head_dim
    yield gpu_work.add_rms_norm(batch, width)
    yield gpu_work.fp8_linear(batch, width, config.q_lora_rank)
    yield gpu_work.fp8_linear(batch, config.q_lora_rank, heads * query_width)
    yield gpu_work.fp8_linear(batch, width, config.kv_lora_rank + config.qk_rope_head_dim)
    yield _bfloat16(batch, width, indexer.head_dim + indexer.num_heads)
    yield gpu_work.store(config, batch, cache)
    seen = min(context, indexer.top_k)
    if context > seen:
        yield gpu_work.fp8_linear(batch, config.q_lora_rank, indexer.num_heads * indexer.head_dim)
        yield gpu_work.scores(config, batch * context, batch * context, batch, cache)
        yield gpu_work.top_k(batch, context, seen)
    of_heads = heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    yield Work(2.0 * batch * of_heads, 2.0 * of_heads)
    yield gpu_work.attention(config, batch * seen, batch * seen, batch, cache)
    yield gpu_work.fp8_linear(batch, heads * config.v_head_dim, width)
    yield gpu_work.add_rms_norm(batch, width)


def _dense(config: DeepseekConfig, batch: int) -> Iterator[Work]:
    for num_inputs, num_outputs in (
        (config.hidden_size, 2 * config.intermediate_size),
        (config.intermediate_size, config.hidden_size),
    ):
        yield gpu_work.fp8_linear(batch, num_inputs, num_outputs)


def _mixture(config: DeepseekConfig, batch: int) -> Iterator[Work]:
    moe, width = config.moe, config.hidden_size
    yield _bfloat16(batch, width, moe.num_experts)
    hit = gpu_work.expected_hit(moe.num_experts, moe.num_experts_per_token, batch)
    yield gpu_work.experts(config, batch * moe.num_experts_per_token, batch, hit)
    shared = moe.num_shared_experts * moe.intermediate_size
    yield gpu_work.fp8_linear(batch, width, 2 * shared)
    yield gpu_work.fp8_linear(batch, shared, width)


def _bfloat16(batch: int, num_inputs: int, num_outputs: int) -> Work:
    size = num_inputs * num_outputs
    return Work(2.0 * batch * size, 2.0 * (size + batch * (num_inputs + num_outputs)))


@dataclass(frozen=True, slots=True)
class SliceTimes:
    """Of one decode step, so many sequences on one GPU; all in seconds."""

    batch: int
    dense_s: float
    """Of the model's dense layers with embedding, head and sampling."""
    with_moe_s: float
    """The same with `num_moe_layers` layers of experts more."""
    num_moe_layers: int
    experts_s: float
    """Of all routed experts of a layer, alone."""
    eighth_s: float
    """Of an eighth of them, alone, with as many pairs of token and expert."""


@dataclass(frozen=True, slots=True)
class Projection:
    """The whole model on eight GPUs: attention of its own sequences on each, an eighth of the experts on each."""

    step_s: float
    tokens_per_s: float
    arithmetic: tuple[str, ...]
    """How these came about, for people."""


def project(config: DeepseekConfig, times: SliceTimes) -> Projection:
    """From a slice on one card to `config` whole on eight of them, at this card's speed.

    Each GPU decodes `batch` sequences. Its eighth of the experts gets the pairs that eight GPUs send, as many as one
    has of its own, so that products stay and fewer weights are read. The exchange counts as not hidden at all.
    """
    moe = config.moe
    num_moe_layers = config.num_layers - config.num_dense_layers
    layer_s = (times.with_moe_s - times.dense_s) / times.num_moe_layers
    exchanged = times.batch * moe.num_experts_per_token * config.hidden_size * (1 + 2)
    exchange_s = exchanged / LINK_BYTES_PER_S
    spread_s = layer_s - times.experts_s + times.eighth_s + exchange_s
    step_s = times.dense_s + num_moe_layers * spread_s
    tokens_per_s = NUM_GPUS * times.batch / step_s
    return Projection(
        step_s,
        tokens_per_s,
        (
            f"layer with experts: ({_ms(times.with_moe_s)} - {_ms(times.dense_s)}) / {times.num_moe_layers}"
            f" = {_ms(layer_s)}",
            f"its {moe.num_experts} experts alone: {_ms(times.experts_s)}; {moe.num_experts // NUM_GPUS} of them with"
            f" as many pairs: {_ms(times.eighth_s)}",
            f"exchange: {times.batch} tokens x {moe.num_experts_per_token} experts x {config.hidden_size} x (1 B there"
            f" + 2 B back) / {LINK_BYTES_PER_S / 1e9:.0f} GB/s = {_ms(exchange_s)}",
            f"layer on {NUM_GPUS} GPUs: {_ms(layer_s)} - {_ms(times.experts_s)} + {_ms(times.eighth_s)}"
            f" + {_ms(exchange_s)} = {_ms(spread_s)}",
            f"step: {_ms(times.dense_s)} for {config.num_dense_layers} dense layers, embedding and head"
            f" + {num_moe_layers} x {_ms(spread_s)} = {_ms(step_s)}",
            f"{NUM_GPUS} GPUs x {times.batch} sequences / {_ms(step_s)} = {tokens_per_s:,.0f} tokens/s"
            f" ({1 / step_s:,.1f} for each sequence)",
        ),
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"
