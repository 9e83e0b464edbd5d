"""What each operation of DeepSeek-V3.2 must read, write and multiply at least, and how fast a GPU could do it. Pure.

Bytes count what must come from memory or go there once; what several programs read again from the L2 cache is free. A
multiply and an add are two FLOP. ReLU, softmax, norms and top-k are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rempart_engine.kernels.latent_cache import LatentLayout
from rempart_engine.model.deepseek.config import DeepseekConfig

Numbers = Literal["bfloat16", "fp8"]
Cache = Literal["bfloat16", "fp8"]
CACHES: tuple[Cache, ...] = ("fp8", "bfloat16")
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Work:
    """The least that an operation costs."""

    flop: float
    num_bytes: float
    numbers: Numbers = "bfloat16"
    """What is multiplied."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the card does at most, measured."""

    bytes_per_s: float
    flop_per_s: Mapping[str, float]
    """By numbers; cards that do not multiply fp8 have none for it, and multiply bfloat16 instead."""

    def flop_per_s_of(self, numbers: Numbers) -> float:
        return self.flop_per_s.get(numbers, self.flop_per_s["bfloat16"])


Works = tuple[Work, ...]
"""Parts of an operation, one after the other."""


def bytes_s(works: Works, rates: Rates) -> float:
    """Seconds that memory takes."""
    return sum(work.num_bytes for work in works) / rates.bytes_per_s


def flop_s(works: Works, rates: Rates) -> float:
    """Seconds that arithmetic takes."""
    return sum(work.flop / rates.flop_per_s_of(work.numbers) for work in works)


def floor_s(works: Works, rates: Rates) -> float:
    """Seconds if memory and arithmetic of each part overlap perfectly, and nothing lies between parts."""
    return sum(max(bytes_s((work,), rates), flop_s((work,), rates)) for work in works)


def latent_bytes(config: DeepseekConfig, cache: Cache) -> int:
    """Of one token's latent record."""
    if cache == "fp8":
        return LatentLayout(config.kv_lora_rank, config.qk_rope_head_dim).num_bytes
    return 2 * (config.kv_lora_rank + config.qk_rope_head_dim)


def index_bytes(config: DeepseekConfig, cache: Cache) -> int:
    """Of one token's index key."""
    return config.indexer.head_dim + 4 if cache == "fp8" else 2 * config.indexer.head_dim


def store(config: DeepseekConfig, num_tokens: int, cache: Cache, *, with_keys: bool = True) -> Work:
    """Projections, sines and cosines in; records and index keys out."""
    per_token = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) + 4 * config.qk_rope_head_dim
    per_token += latent_bytes(config, cache)
    if with_keys:
        per_token += 2 * config.indexer.head_dim + index_bytes(config, cache)
    return Work(0.0, num_tokens * per_token)


def scores(config: DeepseekConfig, num_pairs: int, num_keys: int, num_queries: int, cache: Cache) -> Work:
    """Every pair of a query and a key it sees; `num_keys` distinct keys are read, a float32 score written a pair."""
    heads, dim = config.indexer.num_heads, config.indexer.head_dim
    read = num_keys * index_bytes(config, cache) + num_queries * heads * (2 * dim + 4)
    return Work(2.0 * heads * dim * num_pairs, read + 4 * num_pairs, cache)


def top_k(num_rows: int, num_scores: int, num_chosen: int) -> Work:
    """Scores read once, positions written."""
    return Work(0.0, 4 * num_rows * (num_scores + num_chosen))


def attention(config: DeepseekConfig, num_pairs: int, num_records: int, num_queries: int, cache: Cache) -> Work:
    """Every pair of a query and a token it sees, in absorbed form; `num_records` distinct records are read."""
    heads, latent, rope = config.num_heads, config.kv_lora_rank, config.qk_rope_head_dim
    moved = num_records * latent_bytes(config, cache) + 2 * num_queries * heads * (2 * latent + rope)
    return Work(2.0 * heads * (2 * latent + rope) * num_pairs, moved)


def fp8_linear(num_tokens: int, num_inputs: int, num_outputs: int) -> Work:
    """Weights in fp8 with a scale for each block, activations in bfloat16 in and out."""
    weights = num_inputs * num_outputs + 4 * -(-num_inputs // _BLOCK) * -(-num_outputs // _BLOCK)
    return Work(
        2.0 * num_tokens * num_inputs * num_outputs, weights + 2 * num_tokens * (num_inputs + num_outputs), "fp8"
    )


def experts(config: DeepseekConfig, num_pairs: int, num_tokens: int, num_hit: float) -> Work:
    """`num_pairs` of a token and an expert, over `num_hit` distinct experts whose weights must be read."""
    width, inner = config.hidden_size, config.moe.intermediate_size
    weights = 3 * (width * inner + 4 * -(-width // _BLOCK) * -(-inner // _BLOCK))
    return Work(6.0 * width * inner * num_pairs, num_hit * weights + num_tokens * width * (2 + 4), "fp8")


def add_rms_norm(num_tokens: int, width: int) -> Work:
    """A float32 residual read and written, bfloat16 read and written."""
    return Work(0.0, num_tokens * width * (4 + 4 + 2 + 2))


def sampling(num_rows: int, vocab_size: int) -> Work:
    """float32 logits, read once."""
    return Work(0.0, 4 * num_rows * vocab_size)


def causal_pairs(context: int, num_new: int) -> int:
    """Pairs of each of the last `num_new` tokens of a context with what it sees, itself included."""
    return num_new * (context - num_new) + num_new * (num_new + 1) // 2


def seen_pairs(context: int, num_new: int, top_k: int) -> int:
    """The same where no token sees more than `top_k`."""
    short = max(0, min(num_new, top_k - (context - num_new)))
    return causal_pairs(context - num_new + short, short) + (num_new - short) * top_k


def expected_hit(num_experts: int, num_per_token: int, num_tokens: int) -> float:
    """How many experts get a token at least, if each token takes its own at random."""
    return num_experts * (1.0 - (1.0 - num_per_token / num_experts) ** num_tokens)
