"""What a model's metadata must say, and what is refused."""

from typing import Any

import pytest

from rempart_engine.model.config import LinearScaling, Llama3Scaling, LlamaConfig
from rempart_engine.model.errors import ModelError


def hf(**changes: object) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {name: value for name, value in (config | changes).items() if value is not ...}


def gguf(**changes: object) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 256,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (metadata | changes).items() if value is not ...}


def test_hf_and_gguf_metadata_of_one_model_give_one_config() -> None:
    assert LlamaConfig.from_gguf(gguf(), vocab_size=128) == LlamaConfig.from_hf(hf(tie_word_embeddings=True))


def test_hf_fields_arrive() -> None:
    assert LlamaConfig.from_hf(hf(head_dim=32, attention_bias=True, mlp_bias=True)) == LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_model_len=256,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_absent_hf_fields_have_the_defaults_of_the_architecture() -> None:
    config = LlamaConfig.from_hf(hf(num_key_value_heads=..., rope_theta=..., eos_token_id=None, bos_token_id=None))
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10_000.0)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_generation_config_decides_which_tokens_end_a_sequence() -> None:
    assert LlamaConfig.from_hf(hf(), {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert LlamaConfig.from_hf(hf(eos_token_id=[3, 4]), {}).eos_token_ids == (3, 4)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": None, "rope_theta": 2e4}, 2e4, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, LinearScaling(4.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
            5e5,
            Llama3Scaling(8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            Llama3Scaling(8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rotary_settings_are_read_in_their_old_and_new_place(
    fields: dict[str, object], theta: float, scaling: object
) -> None:
    config = LlamaConfig.from_hf(hf(**fields))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"architectures": ...}, "architectures"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"vocab_size": "128"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"eos_token_id": 128}, "128 is outside the vocabulary"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"num_key_value_heads": 3}, "key-value heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": 4}, "rope_scaling must be an object"),
    ],
)
def test_hf_models_that_do_not_fit_are_refused_by_the_name_of_the_field(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        LlamaConfig.from_hf(hf(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general__architecture": "qwen2"}, "general.architecture must be llama"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__block_count": ...}, "llama.block_count is missing"),
        ({"llama__rope__dimension_count": 8}, "dimension_count"),
        ({"llama__attention__value_length": 8}, "value_length"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type"),
        ({"tokenizer__ggml__eos_token_id": 4096}, "4096 is outside the vocabulary"),
    ],
)
def test_gguf_models_that_do_not_fit_are_refused_by_the_name_of_the_field(
    changes: dict[str, object], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        LlamaConfig.from_gguf(gguf(**changes), vocab_size=128)


def test_gguf_linear_scaling_and_every_end_token_are_read() -> None:
    metadata = gguf(
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=2.0,
        tokenizer__ggml__eot_token_id=3,
        tokenizer__ggml__eom_token_id=2,
    )
    config = LlamaConfig.from_gguf(metadata, vocab_size=128)
    assert config.rope_scaling == LinearScaling(2.0)
    assert config.eos_token_ids == (2, 3)


def llama3_factors() -> list[float]:
    """What `transformers` makes of Llama 3.1's rotary settings, as divisors of the plain frequencies."""
    from transformers import LlamaConfig as HFConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}
    config = HFConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    return [500_000.0 ** (-2 * i / 128) / float(frequency) for i, frequency in enumerate(frequencies)]


def test_the_rule_of_llama_3_is_found_again_in_the_factors_that_gguf_stores() -> None:
    metadata = gguf(llama__embedding_length=512, llama__rope__dimension_count=128, llama__rope__freq_base=500_000.0)
    factors = llama3_factors()
    config = LlamaConfig.from_gguf(metadata, vocab_size=128, rope_factors=factors)
    assert isinstance(config.rope_scaling, Llama3Scaling)
    assert config.rope_scaling.factor == pytest.approx(8.0, rel=1e-4)
    for wrong in ([*factors[:-1], 7.0], factors[:-1], [1.0, *[8.0] * 63]):
        with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
            LlamaConfig.from_gguf(metadata, vocab_size=128, rope_factors=wrong)


def test_untied_changes_the_head_alone() -> None:
    tied = LlamaConfig.from_gguf(gguf(), vocab_size=128)
    assert tied.tie_word_embeddings
    assert tied.untied() == LlamaConfig.from_hf(hf())
