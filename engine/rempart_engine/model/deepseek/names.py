"""The tensors of a DeepSeek sparse-attention model: their names, their shapes, and which may be in fp8.

The names are those of Hugging Face without the leading `model.`: `embed_tokens.weight`,
`layers.{i}.self_attn.q_a_proj.weight`, `norm.weight`, `lm_head.weight`. The MTP layer comes after the last layer, as
`layers.{num_layers}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rempart_engine.model.deepseek.config import DeepseekConfig

Shape = tuple[int, ...]

SCALE_SUFFIX = "_scale_inv"
"""What a name of fp8 values gets for the name of their scales."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must look like."""

    shape: Shape
    may_be_fp8: bool = False


Specs = Mapping[str, TensorSpec]


def expected_tensors(config: DeepseekConfig) -> dict[str, TensorSpec]:
    """Name and look of every tensor that the model is made of, without scales and without `mtp_copies`."""
    table = TensorSpec((config.vocab_size, config.hidden_size))
    specs = {"embed_tokens.weight": table}
    for layer in range(config.num_layers + config.num_mtp_layers):
        specs |= {f"layers.{layer}.{name}": spec for name, spec in layer_tensors(config, layer).items()}
    if config.num_mtp_layers:
        specs |= {f"layers.{config.num_layers}.{name}": spec for name, spec in mtp_tensors(config).items()}
    return specs | {"norm.weight": TensorSpec((config.hidden_size,)), "lm_head.weight": table}


def mtp_tensors(config: DeepseekConfig) -> dict[str, TensorSpec]:
    """What the MTP layer has beside a layer's tensors, below `layers.{num_layers}.`; without `mtp_copies`."""
    norm = TensorSpec((config.hidden_size,))
    return {
        "enorm.weight": norm,
        "hnorm.weight": norm,
        "eh_proj.weight": TensorSpec((config.hidden_size, 2 * config.hidden_size)),
        "shared_head.norm.weight": norm,
    }


def mtp_copies(config: DeepseekConfig) -> dict[str, str]:
    """Tensors of the MTP layer that repeat one of the model: their names, and of what they are copies."""
    if not config.num_mtp_layers:
        return {}
    prefix = f"layers.{config.num_layers}."
    return {
        f"{prefix}embed_tokens.weight": "embed_tokens.weight",
        f"{prefix}shared_head.head.weight": "lm_head.weight",
    }


def layer_tensors(config: DeepseekConfig, layer: int) -> dict[str, TensorSpec]:
    """The tensors of one layer, below `layers.{layer}.`; the layer after the last is the MTP layer."""
    norm = TensorSpec((config.hidden_size,))
    specs = {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}
    specs |= _below("self_attn", _attention(config))
    if layer == config.num_layers or config.indexer.is_full[layer]:
        specs |= _below("self_attn.indexer", _indexer(config))
    if layer < config.num_dense_layers:
        specs |= _below("mlp", _gated(config.hidden_size, config.intermediate_size))
    else:
        specs |= _below("mlp", _mixture(config))
    return specs


def _attention(config: DeepseekConfig) -> Specs:
    heads, rope = config.num_heads, config.qk_rope_head_dim
    return {
        "q_a_proj.weight": _linear(config.q_lora_rank, config.hidden_size),
        "q_a_layernorm.weight": TensorSpec((config.q_lora_rank,)),
        "q_b_proj.weight": _linear(heads * (config.qk_nope_head_dim + rope), config.q_lora_rank),
        "kv_a_proj_with_mqa.weight": _linear(config.kv_lora_rank + rope, config.hidden_size),
        "kv_a_layernorm.weight": TensorSpec((config.kv_lora_rank,)),
        "kv_b_proj.weight": _linear(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj.weight": _linear(config.hidden_size, heads * config.v_head_dim),
    }


def _indexer(config: DeepseekConfig) -> Specs:
    heads, width = config.indexer.num_heads, config.indexer.head_dim
    return {
        "wq_b.weight": _linear(heads * width, config.q_lora_rank),
        "wk.weight": _linear(width, config.hidden_size),
        "k_norm.weight": TensorSpec((width,)),
        "k_norm.bias": TensorSpec((width,)),
        "weights_proj.weight": TensorSpec((heads, config.hidden_size)),
    }


def _mixture(config: DeepseekConfig) -> Specs:
    moe = config.moe
    specs = {
        "gate.weight": TensorSpec((moe.num_experts, config.hidden_size)),
        "gate.e_score_correction_bias": TensorSpec((moe.num_experts,)),
    }
    expert = _gated(config.hidden_size, moe.intermediate_size)
    for index in range(moe.num_experts):
        specs |= _below(f"experts.{index}", expert)
    shared = _gated(config.hidden_size, moe.num_shared_experts * moe.intermediate_size)
    return specs | _below("shared_experts", shared)


def _gated(width: int, inner: int) -> Specs:
    return {
        "gate_proj.weight": _linear(inner, width),
        "up_proj.weight": _linear(inner, width),
        "down_proj.weight": _linear(width, inner),
    }


def _linear(rows: int, columns: int) -> TensorSpec:
    return TensorSpec((rows, columns), may_be_fp8=True)


def _below(prefix: str, specs: Specs) -> dict[str, TensorSpec]:
    return {f"{prefix}.{name}": spec for name, spec in specs.items()}
