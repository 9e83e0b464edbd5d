"""Shape and constants of a Llama model, read from a Hugging Face folder or from a GGUF file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rempart_engine.model.errors import ModelError
from rempart_engine.model.fields import Fields


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every rotary frequency is divided by the factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low rotary frequencies are divided by the factor, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Everything that the Llama architecture leaves open.

    Raises:
        ModelError: the numbers do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_model_len: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if token_id >= self.vocab_size:
                raise ModelError(f"special token id {token_id} is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_hf(
        cls, config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
    ) -> "LlamaConfig":
        """From the contents of config.json and, for the end-of-sequence ids, generation_config.json.

        Raises:
            ModelError: another architecture, code of its own, quantization, or a field that does not fit.
        """
        fields = Fields(config, "config.json")
        _refuse_other_hf_models(fields)
        hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        if not fields.has("head_dim") and hidden_size % num_heads:
            raise fields.error("hidden_size", f"{hidden_size} is not a multiple of {num_heads} attention heads")
        max_model_len = fields.count("max_position_embeddings")
        generation = Fields(generation_config or {}, "generation_config.json")
        bos = fields.token_ids("bos_token_id")
        return cls(
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=fields.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", num_heads),
            head_dim=fields.count("head_dim", hidden_size // num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=_hf_rope(fields).number("rope_theta", fields.number("rope_theta", 10_000.0)),
            rope_scaling=_hf_rope_scaling(_hf_rope(fields), max_model_len),
            max_model_len=max_model_len,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, object], *, vocab_size: int, rope_factors: Sequence[float] | None = None
    ) -> "LlamaConfig":
        """From the scalar key-value pairs of a GGUF file. Embeddings are taken as tied: see `untied`.

        Args:
            vocab_size: rows of the embedding; some files do not state it elsewhere.
            rope_factors: the tensor `rope_freqs.weight`, by which Llama 3.1 and later divide their frequencies.

        Raises:
            ModelError: another architecture, or a field that does not fit.
        """
        fields = Fields(metadata, "GGUF metadata")
        architecture = fields.text("general.architecture")
        if architecture != "llama":
            raise fields.error("general.architecture", f"must be llama, got {architecture!r}")
        if fields.has("llama.expert_count") and metadata["llama.expert_count"] != 0:
            raise fields.error("llama.expert_count", "is set: mixtures of experts are not supported")
        hidden_size, num_heads = fields.count("llama.embedding_length"), fields.count("llama.attention.head_count")
        head_dim = fields.count("llama.attention.key_length", max(hidden_size // num_heads, 1))
        for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if fields.count(name, head_dim) != head_dim:
                raise fields.error(name, f"must equal the head dimension {head_dim}, got {metadata[name]!r}")
        bos = fields.token_ids("tokenizer.ggml.bos_token_id")
        ends = [i for name in _GGUF_END_TOKENS for i in fields.token_ids(f"tokenizer.ggml.{name}_token_id")]
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.count("llama.feed_forward_length"),
            num_layers=fields.count("llama.block_count"),
            num_heads=num_heads,
            num_kv_heads=fields.count("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=fields.number("llama.rope.freq_base", 10_000.0),
            rope_scaling=_gguf_rope_scaling(fields, rope_factors, head_dim),
            max_model_len=fields.count("llama.context_length"),
            tie_word_embeddings=True,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(ends)),
        )

    def untied(self) -> "LlamaConfig":
        """The same model with an output head of its own."""
        return replace(self, tie_word_embeddings=False)


_GGUF_END_TOKENS = ("eos", "eot", "eom")


def _refuse_other_hf_models(fields: Fields) -> None:
    if fields.has("auto_map"):
        raise fields.error("auto_map", "names code of the model repository, which is never run")
    if fields.has("quantization_config"):
        raise fields.error("quantization_config", "is set: quantized safetensors are not supported")
    architectures = fields.values.get("architectures")
    if architectures != ["LlamaForCausalLM"]:
        raise fields.error("architectures", f"must be ['LlamaForCausalLM'], got {architectures!r}")
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise fields.error("hidden_act", f"must be 'silu', got {activation!r}")


def _hf_rope(fields: Fields) -> Fields:
    """Rotary settings: `rope_parameters` in newer files, `rope_scaling` beside a plain `rope_theta` in older ones."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def _hf_rope_scaling(rope: Fields, max_model_len: int) -> RopeScaling | None:
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "must be 1: heads are rotated whole")
    kind = rope.text("rope_type", rope.text("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position_embeddings=rope.count("original_max_position_embeddings", max_model_len),
            )
        case _:
            raise rope.error("rope_type", f"must be default, linear or llama3, got {kind!r}")


def _gguf_rope_scaling(fields: Fields, factors: Sequence[float] | None, head_dim: int) -> RopeScaling | None:
    kind = fields.text("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.error("llama.rope.scaling.type", f"must be none or linear, got {kind!r}")
    if kind == "linear":
        if factors is not None:
            raise fields.error("llama.rope.scaling.type", "is linear and there is a tensor rope_freqs.weight too")
        return LinearScaling(fields.number("llama.rope.scaling.factor"))
    return None if factors is None else _llama3_from_factors(fields, factors, head_dim)


def _llama3_from_factors(fields: Fields, factors: Sequence[float], head_dim: int) -> Llama3Scaling:
    """GGUF keeps Llama 3's rule only as its result, one divisor per frequency: find the rule and check it."""
    theta = fields.number("llama.rope.freq_base", 10_000.0)
    scaling = Llama3Scaling(max(factors), 1.0, 4.0, 8192)  # what every Llama 3.x has, but for the factor
    expected = [_llama3_divisor(theta ** (-2 * i / head_dim), scaling) for i in range(head_dim // 2)]
    if len(factors) != len(expected) or any(
        not math.isclose(factor, want, rel_tol=1e-4) for factor, want in zip(factors, expected, strict=True)
    ):
        raise ModelError(f"{fields.origin}: rope_freqs.weight does not follow the rule of Llama 3")
    return scaling


def _llama3_divisor(frequency: float, scaling: Llama3Scaling) -> float:
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = min(max(blend, 0.0), 1.0)
    return 1.0 / ((1.0 - blend) / scaling.factor + blend)
