"""The tensors that follow from a config, against the parameters of the model that transformers builds from it."""

from typing import Any

import pytest
import torch
import transformers

from rempart_platform.plan.fields import Fields
from rempart_platform.plan.shapes import shape_from_config
from rempart_platform.plan.tensors import num_params

SPARSE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "index_n_heads": 5,
    "index_head_dim": 16,
    "index_topk": 4,
    "max_position_embeddings": 64,
}
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("deepseek_v32", SPARSE),
        ("deepseek_v32", {**SPARSE, "first_k_dense_replace": 1, "n_shared_experts": 1}),
        ("glm_moe_dsa", SPARSE),
        ("glm_moe_dsa", {**SPARSE, "index_topk_freq": 2, "index_skip_topk_offset": 2}),
        ("glm_moe_dsa", {**SPARSE, "index_topk_pattern": "FSSFSF"}),
        ("glm_moe_dsa", {**SPARSE, "indexer_types": ["full", "shared", "full", "full", "shared", "shared"]}),
        ("llama", LLAMA),
        ("llama", {**LLAMA, "tie_word_embeddings": True}),
        ("llama", {**LLAMA, "head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    ],
)
def test_parameters_are_those_that_transformers_builds(model_type: str, values: dict[str, Any]) -> None:
    auto: Any = transformers.AutoModelForCausalLM  # its methods carry no types
    config = transformers.AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        model = auto.from_config(config)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    expected = sum(each.numel() for each in (*model.parameters(), *biases.values()))
    shape = shape_from_config(Fields({"model_type": model_type, **values}, "config.json"), "tiny")
    assert num_params(shape.tensors) == expected
