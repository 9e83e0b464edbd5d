"""Shape and constants of a DeepSeek sparse-attention model: DeepSeek-V3.2 and its relatives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rempart_engine.model.errors import ModelError
from rempart_engine.model.fields import Fields


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): low rotary frequencies are divided by the factor, high ones kept, a ramp between.

    The attention's temperature is not put into cos and sin but, squared, into the softmax scale.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Routed experts of the layers after the first dense ones."""

    num_experts: int
    num_shared_experts: int
    num_experts_per_token: int
    intermediate_size: int
    """Of one expert."""
    num_groups: int
    num_chosen_groups: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    """The lightning indexer."""

    num_heads: int
    head_dim: int
    top_k: int
    """Most tokens that attention sees."""
    rope: Literal["half-split", "interleaved"]
    """How rotary pairs lie: (i, i + P/2) in DeepSeek-V3.2, (2i, 2i + 1) in GLM."""
    is_full: tuple[bool, ...]
    """Per layer: has an indexer of its own (True), or sees the tokens that the last full layer before it chose."""


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """How the checkpoint's fp8 weights are scaled: one scale for each block of rows x columns."""

    block_rows: int
    block_columns: int


@dataclass(frozen=True, slots=True)
class DeepseekConfig:
    """Everything that the architecture leaves open.

    Raises:
        ModelError: the numbers do not fit each other.
    """

    architecture: str
    """"DeepseekV32ForCausalLM" or "GlmMoeDsaForCausalLM"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    max_model_len: int
    moe: MoEConfig
    indexer: IndexerConfig
    num_mtp_layers: int
    fp8: Fp8Blocks | None = None
    """None when no tensor of the checkpoint is in fp8."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.indexer.head_dim:
            raise ModelError(
                f"qk_rope_head_dim must be even and at most index_head_dim = {self.indexer.head_dim}, "
                f"got {self.qk_rope_head_dim}"
            )
        if len(self.indexer.is_full) != self.num_layers or not self.indexer.is_full[0]:
            raise ModelError("every layer needs an indexer mode, and the first layer an indexer of its own")
        if self.num_dense_layers > self.num_layers:
            raise ModelError(f"{self.num_dense_layers} of {self.num_layers} layers cannot be dense")
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if token_id >= self.vocab_size:
                raise ModelError(f"special token id {token_id} is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_hf(
        cls, config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
    ) -> "DeepseekConfig":
        """From the contents of config.json and, for the end-of-sequence ids, generation_config.json.

        Raises:
            ModelError: another architecture, code of its own, or a field that does not fit; named.
        """
        fields = Fields(config, "config.json")
        architecture = _hf_architecture(fields)
        _refuse_other_kinds(fields)
        num_layers = fields.count("num_hidden_layers")
        qk_nope_head_dim, qk_rope_head_dim = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
        _require(fields, "qk_head_dim", qk_nope_head_dim + qk_rope_head_dim)
        _require(fields, "num_key_value_heads", fields.count("num_attention_heads"))
        generation = Fields(generation_config or {}, "generation_config.json")
        rope, bos = _hf_rope(fields), fields.token_ids("bos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=fields.count("vocab_size"),
            hidden_size=fields.count("hidden_size"),
            intermediate_size=fields.count("intermediate_size"),
            num_layers=num_layers,
            num_dense_layers=_num_dense_layers(fields, num_layers),
            num_heads=fields.count("num_attention_heads"),
            q_lora_rank=fields.count("q_lora_rank"),
            kv_lora_rank=fields.count("kv_lora_rank"),
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=fields.count("v_head_dim"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta"),
            rope_scaling=_hf_rope_scaling(rope),
            max_model_len=fields.count("max_position_embeddings"),
            moe=_hf_moe(fields),
            indexer=IndexerConfig(
                num_heads=fields.count("index_n_heads"),
                head_dim=fields.count("index_head_dim"),
                top_k=fields.count("index_topk"),
                rope="interleaved" if fields.flag("indexer_rope_interleave", architecture == _GLM) else "half-split",
                is_full=_full_indexers(fields, num_layers),
            ),
            num_mtp_layers=_num_mtp_layers(fields),
            fp8=_hf_fp8(fields),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        )


_GLM = "GlmMoeDsaForCausalLM"
_MODEL_TYPES = {"DeepseekV32ForCausalLM": "deepseek_v32", _GLM: "glm_moe_dsa"}
ARCHITECTURES = frozenset(_MODEL_TYPES)
"""What config.json's `architectures` may name."""

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
"""Fields that may be there with this value alone."""
_YARN_FIELDS = frozenset(
    {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
)
_INDEXER_IS_FULL = {"F": True, "full": True, "S": False, "shared": False}


def _hf_architecture(fields: Fields) -> str:
    if fields.has("auto_map"):
        raise fields.error("auto_map", "names code of the model repository, which is never run")
    architectures = fields.texts("architectures")
    if len(architectures) != 1 or architectures[0] not in _MODEL_TYPES:
        raise fields.error("architectures", f"must be one of {sorted(_MODEL_TYPES)}, got {list(architectures)}")
    _require(fields, "model_type", _MODEL_TYPES[architectures[0]])
    return architectures[0]


def _refuse_other_kinds(fields: Fields) -> None:
    for name, only in _ONLY.items():
        _require(fields, name, only)
    if set(fields.texts("layer_types")) - {"indexed_attention"}:
        raise fields.error("layer_types", "has another kind of layer than indexed_attention")


def _require(fields: Fields, name: str, only: object) -> None:
    if fields.has(name) and fields.values[name] != only:
        raise fields.error(name, f"must be {only!r}, got {fields.values[name]!r}")


def _num_dense_layers(fields: Fields, num_layers: int) -> int:
    num_dense = min(fields.count_or_zero("first_k_dense_replace"), num_layers)
    expected = ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)
    if fields.has("mlp_layer_types") and fields.texts("mlp_layer_types") != expected:
        raise fields.error("mlp_layer_types", f"contradicts first_k_dense_replace = {num_dense}")
    return num_dense


def _num_mtp_layers(fields: Fields) -> int:
    number = fields.count_or_zero("num_nextn_predict_layers", 0)
    if number > 1:
        raise fields.error("num_nextn_predict_layers", f"must be 0 or 1, got {number}")
    return number


def _hf_moe(fields: Fields) -> MoEConfig:
    moe = MoEConfig(
        num_experts=fields.count("n_routed_experts"),
        num_shared_experts=fields.count("n_shared_experts"),
        num_experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count("moe_intermediate_size"),
        num_groups=fields.count("n_group"),
        num_chosen_groups=fields.count("topk_group"),
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )
    group_size, rest = divmod(moe.num_experts, moe.num_groups)
    if rest or group_size < 2:  # a group's score is the sum of its two best experts
        raise fields.error(
            "n_group", f"{moe.num_groups} must part {moe.num_experts} experts evenly, at least 2 in each"
        )
    if moe.num_chosen_groups > moe.num_groups:
        raise fields.error("topk_group", f"{moe.num_chosen_groups} is more than n_group = {moe.num_groups}")
    if moe.num_experts_per_token > moe.num_chosen_groups * group_size:
        raise fields.error(
            "num_experts_per_tok",
            f"{moe.num_experts_per_token} is more than {moe.num_chosen_groups} groups of {group_size} hold",
        )
    return moe


def _full_indexers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which layers have an indexer of their own; the three ways to say it must agree where more than one is used."""
    ways: dict[str, tuple[bool, ...]] = {}
    for name in ("indexer_types", "index_topk_pattern"):
        if not fields.has(name):
            continue
        value = fields.values[name]
        modes = tuple(value) if isinstance(value, str) else fields.texts(name)
        if len(modes) != num_layers or set(modes) - _INDEXER_IS_FULL.keys():
            raise fields.error(name, f"must say full or shared for each of {num_layers} layers, got {value!r}")
        ways[name] = tuple(_INDEXER_IS_FULL[mode] for mode in modes)
    if fields.has("index_topk_freq") or not ways:
        every, offset = fields.count("index_topk_freq", 1), fields.count_or_zero("index_skip_topk_offset", 2)
        ways["index_topk_freq"] = tuple(max(layer - offset + 1, 0) % every == 0 for layer in range(num_layers))
    name, is_full = next(iter(ways.items()))
    for other, modes_of_other in ways.items():
        if modes_of_other != is_full:
            raise fields.error(other, f"contradicts {name}")
    if not is_full[0]:
        raise fields.error(name, "gives the first layer no indexer of its own")
    return is_full


def _hf_rope(fields: Fields) -> Fields:
    """Rotary settings: `rope_parameters` in newer files, `rope_scaling` beside a plain `rope_theta` in older ones."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def _hf_rope_scaling(rope: Fields) -> YarnScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("default", "yarn"):
        raise rope.error("rope_type", f"must be default or yarn, got {kind!r}")
    known = {"rope_type", "type", "rope_theta"} | (_YARN_FIELDS if kind == "yarn" else set())
    for name in rope.values:
        if name not in known and rope.has(name):
            raise rope.error(name, f"is not known for rope_type {kind}")
    if kind == "default":
        return None
    return YarnScaling(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.count("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale"),
        mscale_all_dim=rope.number("mscale_all_dim"),
    )


def _hf_fp8(fields: Fields) -> Fp8Blocks | None:
    if not fields.has("quantization_config"):
        return None
    quantization = fields.section("quantization_config")
    if quantization.text("quant_method") != "fp8":
        raise quantization.error("quant_method", f"must be 'fp8', got {quantization.values['quant_method']!r}")
    _require(quantization, "fmt", "e4m3")
    _require(quantization, "activation_scheme", "dynamic")
    if quantization.text("scale_fmt", "float") not in ("float", "ue8m0"):
        raise quantization.error("scale_fmt", f"must be 'ue8m0', got {quantization.values['scale_fmt']!r}")
    match quantization.values.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Fp8Blocks(rows, columns)
        case other:
            raise quantization.error("weight_block_size", f"must be two positive integers, got {other!r}")
