"""Attention's cache and work by context. Whatever is not said to be of one layer is of all layers."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

_SCALE_GROUP = 128
_F32_BYTES = 4
_BF16_BYTES = 2


class CacheFormat(StrEnum):
    """BF16 keeps the latent (or keys and values) in bf16; index keys are fp8 with an fp32 scale in both."""

    FP8 = "fp8"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class AttentionFlop:
    """Work of attention, without projections: a multiply and an add are 2."""

    attend: int
    """Scores and weighted sums."""
    index: int = 0
    """The indexer's scores."""


class Attention(Protocol):
    """What planning asks of an attention."""

    @property
    def num_heads(self) -> int:
        """Query heads: tensor-parallel ranks must divide them."""
        ...

    @property
    def is_sparse(self) -> bool: ...

    def cache_shards(self, num_ranks: int) -> int:
        """Parts that tensor-parallel ranks can cut one sequence's cache into."""
        ...

    def cache_bytes(self, cache_format: CacheFormat, *, with_mtp: bool = False) -> int:
        """Per token."""
        ...

    def cache_formula(self, cache_format: CacheFormat, *, with_mtp: bool = False) -> str: ...

    def read_bytes(self, cache_format: CacheFormat, context: int, *, dense: bool = False) -> int:
        """Cache read to decode one token of one sequence that has `context` tokens."""
        ...

    def read_formula(self, cache_format: CacheFormat, context: int, *, dense: bool = False) -> str: ...

    def decode_flop(self, context: int, *, dense: bool = False) -> AttentionFlop:
        """For one token after `context` tokens, itself included."""
        ...

    def decode_flop_formula(self, context: int, *, dense: bool = False) -> str: ...

    def prefill_flop(self, num_tokens: int, *, dense: bool = False) -> AttentionFlop:
        """For a prompt from its first token on."""
        ...

    def prefill_flop_formula(self, num_tokens: int, *, dense: bool = False) -> str: ...


@dataclass(frozen=True, slots=True)
class SparseAttention:
    """Multi-head latent attention over the tokens that an indexer chose.

    One latent record per token serves all heads, so that tensor-parallel ranks each need every sequence's whole cache.
    """

    num_layers: int
    num_index_layers: int
    """Layers with an indexer, and hence index keys, of their own."""
    num_mtp_layers: int
    """Each with a latent and index keys of its own."""
    num_heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    num_index_heads: int
    index_dim: int
    top_k: int

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def index_record_bytes(self) -> int:
        """Per token and layer: e4m3, an fp32 scale for each 128."""
        return _fp8_bytes(self.index_dim)

    @property
    def absorbed_pair_flop(self) -> int:
        """Per query, key and layer, in the latent space (the MQA form)."""
        return 2 * self.num_heads * (2 * self.latent_dim + self.rope_dim)

    @property
    def expanded_pair_flop(self) -> int:
        """Per query, key and layer, over keys and values of each head (the MHA form)."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def index_pair_flop(self) -> int:
        """Per query, key and layer with an indexer."""
        return 2 * self.num_index_heads * self.index_dim

    def latent_record_bytes(self, cache_format: CacheFormat) -> int:
        """Per token and layer: the latent (fp8: an fp32 scale for each 128), then the rope key in bf16."""
        if cache_format is CacheFormat.FP8:
            return _fp8_bytes(self.latent_dim) + self.rope_dim * _BF16_BYTES
        return (self.latent_dim + self.rope_dim) * _BF16_BYTES

    def cache_shards(self, num_ranks: int) -> int:
        return 1

    def cache_bytes(self, cache_format: CacheFormat, *, with_mtp: bool = False) -> int:
        extra = self.num_mtp_layers if with_mtp else 0
        latents = (self.num_layers + extra) * self.latent_record_bytes(cache_format)
        return latents + (self.num_index_layers + extra) * self.index_record_bytes

    def cache_formula(self, cache_format: CacheFormat, *, with_mtp: bool = False) -> str:
        extra = self.num_mtp_layers if with_mtp else 0
        return (
            f"{self.num_layers + extra} layers * {self.latent_record_bytes(cache_format)} B latent"
            f" + {self.num_index_layers + extra} index layers * {self.index_record_bytes} B index keys"
        )

    def read_bytes(self, cache_format: CacheFormat, context: int, *, dense: bool = False) -> int:
        attended = context if dense else min(context, self.top_k)
        latents = self.num_layers * attended * self.latent_record_bytes(cache_format)
        return latents + self._scored(context, dense) * self.num_index_layers * self.index_record_bytes

    def read_formula(self, cache_format: CacheFormat, context: int, *, dense: bool = False) -> str:
        attended = f"{context:,}" if dense else f"min({context:,}; {self.top_k:,})"
        text = f"{self.num_layers} layers * {attended} tokens * {self.latent_record_bytes(cache_format)} B"
        if scored := self._scored(context, dense):
            text += f" + {self.num_index_layers} index layers * {scored:,} tokens * {self.index_record_bytes} B"
        return text

    def decode_flop(self, context: int, *, dense: bool = False) -> AttentionFlop:
        attended = context if dense else min(context, self.top_k)
        return AttentionFlop(
            attend=self.num_layers * attended * self.absorbed_pair_flop,
            index=self.num_index_layers * self._scored(context, dense) * self.index_pair_flop,
        )

    def decode_flop_formula(self, context: int, *, dense: bool = False) -> str:
        attended = f"{context:,}" if dense else f"min({context:,}; {self.top_k:,})"
        text = f"{self.num_layers} layers * {attended} tokens * {self.absorbed_pair_flop:,} FLOP"
        if scored := self._scored(context, dense):
            text += f" + {self.num_index_layers} index layers * {scored:,} tokens * {self.index_pair_flop:,} FLOP"
        return text

    def prefill_flop(self, num_tokens: int, *, dense: bool = False) -> AttentionFlop:
        """Sparse: each form over the whole prompt, the cheaper of the two."""
        every = _causal_pairs(num_tokens)
        expanded = every * self.expanded_pair_flop
        if dense:
            return AttentionFlop(attend=self.num_layers * expanded)
        absorbed = self._chosen_pairs(num_tokens) * self.absorbed_pair_flop
        return AttentionFlop(
            attend=self.num_layers * min(absorbed, expanded),
            index=self.num_index_layers * self._scored_pairs(num_tokens) * self.index_pair_flop,
        )

    def prefill_flop_formula(self, num_tokens: int, *, dense: bool = False) -> str:
        expanded = f"{_causal_pairs(num_tokens):,} pairs * {self.expanded_pair_flop:,} FLOP"
        if dense:
            return f"{self.num_layers} layers * {expanded}"
        absorbed = f"{self._chosen_pairs(num_tokens):,} pairs * {self.absorbed_pair_flop:,} FLOP"
        text = f"{self.num_layers} layers * min({absorbed}; {expanded})"
        if scored := self._scored_pairs(num_tokens):
            text += f" + {self.num_index_layers} index layers * {scored:,} pairs * {self.index_pair_flop:,} FLOP"
        return text

    def _scored(self, context: int, dense: bool) -> int:
        """Index keys scored for one query: none while every token is chosen anyway."""
        return 0 if dense or context <= self.top_k else context

    def _chosen_pairs(self, num_tokens: int) -> int:
        full = min(num_tokens, self.top_k)
        return _causal_pairs(full) + (num_tokens - full) * self.top_k

    def _scored_pairs(self, num_tokens: int) -> int:
        return _causal_pairs(num_tokens) - _causal_pairs(min(num_tokens, self.top_k))


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Dense attention with key-value heads that groups of query heads share (Llama)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def pair_flop(self) -> int:
        """Per query, key and layer."""
        return 4 * self.num_heads * self.head_dim

    def cache_shards(self, num_ranks: int) -> int:
        return min(num_ranks, self.num_kv_heads)

    def cache_bytes(self, cache_format: CacheFormat, *, with_mtp: bool = False) -> int:
        width = 1 if cache_format is CacheFormat.FP8 else _BF16_BYTES
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * width

    def cache_formula(self, cache_format: CacheFormat, *, with_mtp: bool = False) -> str:
        width = 1 if cache_format is CacheFormat.FP8 else _BF16_BYTES
        return f"2 * {self.num_layers} layers * {self.num_kv_heads} heads * {self.head_dim} * {width} B"

    def read_bytes(self, cache_format: CacheFormat, context: int, *, dense: bool = False) -> int:
        return context * self.cache_bytes(cache_format)

    def read_formula(self, cache_format: CacheFormat, context: int, *, dense: bool = False) -> str:
        return f"{context:,} tokens * {self.cache_bytes(cache_format):,} B"

    def decode_flop(self, context: int, *, dense: bool = False) -> AttentionFlop:
        return AttentionFlop(self.num_layers * context * self.pair_flop)

    def decode_flop_formula(self, context: int, *, dense: bool = False) -> str:
        return f"{self.num_layers} layers * {context:,} tokens * {self.pair_flop:,} FLOP"

    def prefill_flop(self, num_tokens: int, *, dense: bool = False) -> AttentionFlop:
        return AttentionFlop(self.num_layers * _causal_pairs(num_tokens) * self.pair_flop)

    def prefill_flop_formula(self, num_tokens: int, *, dense: bool = False) -> str:
        return f"{self.num_layers} layers * {_causal_pairs(num_tokens):,} pairs * {self.pair_flop:,} FLOP"


def _fp8_bytes(dim: int) -> int:
    return dim + -(-dim // _SCALE_GROUP) * _F32_BYTES


def _causal_pairs(num_tokens: int) -> int:
    """Of a query and a key not after it."""
    return num_tokens * (num_tokens + 1) // 2
