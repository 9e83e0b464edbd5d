"""What a DeepSeek configuration must say, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from rempart_engine.model.deepseek.config import (
    DeepseekConfig,
    Fp8Blocks,
    IndexerConfig,
    MoEConfig,
    YarnScaling,
)
from rempart_engine.model.deepseek.names import expected_tensors, layer_tensors, mtp_copies
from rempart_engine.model.deepseek.testing import TINY, TINY_GLM, hf_config
from rempart_engine.model.errors import ModelError

V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "num_nextn_predict_layers": 1,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    },
}


def v32(**changes: object) -> dict[str, Any]:
    """DeepSeek-V3.2's config.json with changes; `...` takes a field out."""
    return {name: value for name, value in (V32 | changes).items() if value is not ...}


def yarn(**changes: object) -> dict[str, Any]:
    scaling = {name: value for name, value in (V32["rope_scaling"] | changes).items() if value is not ...}
    return v32(rope_scaling=scaling)


def fp8(**changes: object) -> dict[str, Any]:
    return v32(quantization_config=V32["quantization_config"] | changes)


def test_the_published_fields_arrive() -> None:
    assert DeepseekConfig.from_hf(V32) == DeepseekConfig(
        architecture="DeepseekV32ForCausalLM",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        rope_scaling=YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0),
        max_model_len=163840,
        moe=MoEConfig(256, 1, 8, 2048, 8, 4, True, 2.5),
        indexer=IndexerConfig(64, 128, 2048, "half-split", (True,) * 61),
        num_mtp_layers=1,
        fp8=Fp8Blocks(128, 128),
        bos_token_id=0,
        eos_token_ids=(1,),
    )


def test_the_published_model_has_the_tensors_and_bytes_that_are_known_of_it() -> None:
    """92,425 tensors, 55 of them in the embedding and layers 0 and 1; 685.4 billion numbers in 689.5 GB."""
    config = DeepseekConfig.from_hf(V32)
    specs = expected_tensors(config)
    specs |= {name: specs[original] for name, original in mtp_copies(config).items()}
    scaled = [spec for spec in specs.values() if spec.may_be_fp8]
    assert len(specs) + len(scaled) == 92_425
    assert 1 + 2 * sum(1 + spec.may_be_fp8 for spec in layer_tensors(config, 0).values()) == 55
    assert specs["layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    numbers = {name: math.prod(spec.shape) for name, spec in specs.items()}
    assert sum(numbers.values()) == pytest.approx(685.35e9, rel=1e-4)
    num_bytes = sum(numbers[name] * (1 if spec.may_be_fp8 else 2) for name, spec in specs.items())
    num_bytes += sum(
        4 * math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in (s.shape for s in scaled)
    )
    assert num_bytes == pytest.approx(689.5e9, rel=1e-3)


@pytest.mark.parametrize("config", [TINY, TINY_GLM, replace(TINY, rope_scaling=None, fp8=None, num_mtp_layers=0)])
def test_what_is_written_is_read(config: DeepseekConfig) -> None:
    assert DeepseekConfig.from_hf(hf_config(config)) == config


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
def test_what_transformers_writes_is_read(name: str) -> None:
    import transformers

    config_class = getattr(transformers, f"{name}Config")
    default = DeepseekConfig.from_hf(config_class(architectures=[f"{name}ForCausalLM"]).to_dict())
    assert (default.qk_rope_head_dim, default.indexer.top_k, default.num_dense_layers) == (64, 2048, 3)
    assert default.indexer.rope == ("half-split" if name == "DeepseekV32" else "interleaved")
    assert default.rope_scaling is None
    rope = {"rope_type": "yarn", "rope_theta": 5e4, **yarn()["rope_scaling"]}
    del rope["type"]
    scaled = config_class(architectures=[f"{name}ForCausalLM"], rope_parameters=rope, num_hidden_layers=2)
    read = DeepseekConfig.from_hf(scaled.to_dict())
    assert read.rope_scaling == YarnScaling(40.0, 4096)
    assert (read.rope_theta, read.num_dense_layers) == (5e4, 2)


def test_end_of_sequence_ids_are_those_of_the_generation_configuration() -> None:
    assert DeepseekConfig.from_hf(V32, {"eos_token_id": [1, 7]}).eos_token_ids == (1, 7)
    assert DeepseekConfig.from_hf(V32, {"temperature": 1.0}).eos_token_ids == (1,)


def glm(num_layers: int, **changes: object) -> dict[str, Any]:
    named = {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"}
    return v32(num_hidden_layers=num_layers, **named, **changes)


def test_layers_that_share_an_indexer_can_be_given_in_three_ways() -> None:
    by_rule = DeepseekConfig.from_hf(glm(78, index_topk_freq=4, index_skip_topk_offset=3)).indexer
    assert [layer for layer, full in enumerate(by_rule.is_full) if full] == [0, 1, 2, *range(6, 78, 4)]
    for way in ({"index_topk_pattern": "FSSF"}, {"indexer_types": ["full", "shared", "shared", "full"]}):
        assert DeepseekConfig.from_hf(glm(4, **way)).indexer.is_full == (True, False, False, True)
    both = {"index_topk_pattern": "FFSS", "indexer_types": ["full", "full", "shared", "shared"]}
    assert DeepseekConfig.from_hf(glm(4, **both)).indexer.is_full == (True, True, False, False)
    assert DeepseekConfig.from_hf(glm(4)).indexer == IndexerConfig(64, 128, 2048, "interleaved", (True,) * 4)
    assert DeepseekConfig.from_hf(glm(4, indexer_rope_interleave=False)).indexer.rope == "half-split"


REFUSED: list[tuple[dict[str, Any], str]] = [
    (v32(auto_map={"AutoModel": "code.Model"}), "auto_map names code"),
    (v32(architectures=["DeepseekV3ForCausalLM"]), "architectures must be one of"),
    (v32(architectures=...), "architectures must be one of"),
    (v32(model_type="deepseek_v3"), "model_type must be 'deepseek_v32'"),
    (v32(num_hidden_layers=...), "num_hidden_layers is missing"),
    (v32(index_topk=0), "index_topk must be a positive integer"),
    (v32(q_lora_rank=None), "q_lora_rank is missing"),
    (v32(num_key_value_heads=8), "num_key_value_heads must be 128"),
    (v32(qk_head_dim=128), "qk_head_dim must be 192"),
    (v32(scoring_func="softmax"), "scoring_func must be 'sigmoid'"),
    (v32(topk_method="greedy"), "topk_method must be 'noaux_tc'"),
    (v32(attention_bias=True), "attention_bias must be False"),
    (v32(hidden_act="gelu"), "hidden_act must be 'silu'"),
    (v32(tie_word_embeddings=True), "tie_word_embeddings must be False"),
    (v32(moe_layer_freq=2), "moe_layer_freq must be 1"),
    (v32(rope_interleave=False), "rope_interleave must be True"),
    (v32(layer_types=["sliding_attention"] * 61), "layer_types has another kind"),
    (v32(first_k_dense_replace=-1), "first_k_dense_replace must be an integer that is not negative"),
    (v32(mlp_layer_types=["dense"] * 2 + ["sparse"] * 59), "mlp_layer_types contradicts first_k_dense_replace = 3"),
    (v32(num_nextn_predict_layers=2), "num_nextn_predict_layers must be 0 or 1"),
    (v32(n_group=7), "n_group 7 must part 256 experts evenly"),
    (v32(n_group=256), "n_group 256 must part 256 experts evenly, at least 2 in each"),
    (v32(topk_group=9), "topk_group 9 is more than n_group = 8"),
    (v32(num_experts_per_tok=129), "num_experts_per_tok 129 is more than 4 groups of 32 hold"),
    (v32(qk_rope_head_dim=63), "qk_rope_head_dim must be even"),
    (v32(qk_rope_head_dim=256), "qk_rope_head_dim must be even and at most index_head_dim = 128"),
    (v32(eos_token_id=129280), "special token id 129280 is outside the vocabulary"),
    (v32(rope_theta=...), "rope_theta is missing"),
    (yarn(type="linear"), "rope_scaling: rope_type must be default or yarn, got 'linear'"),
    (yarn(factor=...), "rope_scaling: factor is missing"),
    (yarn(mscale_all_dim=...), "rope_scaling: mscale_all_dim is missing"),
    (yarn(truncate=False), "rope_scaling: truncate is not known for rope_type yarn"),
    (yarn(attention_factor=1.2), "rope_scaling: attention_factor is not known"),
    (v32(rope_scaling={"type": "default", "factor": 40.0}), "factor is not known for rope_type default"),
    (fp8(quant_method="gptq"), "quantization_config: quant_method must be 'fp8'"),
    (fp8(fmt="e5m2"), "quantization_config: fmt must be 'e4m3'"),
    (fp8(activation_scheme="static"), "quantization_config: activation_scheme must be 'dynamic'"),
    (fp8(weight_block_size=None), "quantization_config: weight_block_size must be two positive integers, got None"),
    (fp8(weight_block_size=[128, 0]), "quantization_config: weight_block_size must be two positive integers"),
    (fp8(scale_fmt="e3m4"), "quantization_config: scale_fmt must be 'ue8m0'"),
    (glm(4, index_topk_pattern="FSX!"), "index_topk_pattern must say full or shared for each of 4 layers"),
    (glm(4, indexer_types=["full"] * 3), "indexer_types must say full or shared for each of 4 layers"),
    (glm(4, indexer_types="FSS"), "indexer_types must say full or shared"),
    (glm(4, indexer_types=["shared", "full", "full", "full"]), "indexer_types gives the first layer no indexer"),
    (glm(4, indexer_types=["full"] * 4, index_topk_freq=3), "index_topk_freq contradicts indexer_types"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_configuration_that_does_not_fit_is_refused_by_the_name_of_the_field(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message.replace("[", r"\[")):
        DeepseekConfig.from_hf(config)
