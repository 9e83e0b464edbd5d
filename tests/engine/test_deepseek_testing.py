"""The random checkpoints that other tests are built on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rempart_engine.model.deepseek.config import (
    DeepseekConfig,
    Fp8Blocks,
    IndexerConfig,
    MoEConfig,
    YarnScaling,
)
from rempart_engine.model.deepseek.testing import StoredAs, oracle, stored_tensors, write_checkpoint

CONFIG = DeepseekConfig(
    architecture="DeepseekV32ForCausalLM",
    vocab_size=96,
    hidden_size=40,
    intermediate_size=56,
    num_layers=3,
    num_dense_layers=1,
    num_heads=3,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=YarnScaling(factor=40.0, original_max_position_embeddings=64),
    max_model_len=2560,
    moe=MoEConfig(
        num_experts=6,
        num_shared_experts=1,
        num_experts_per_token=2,
        intermediate_size=20,
        num_groups=3,
        num_chosen_groups=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    indexer=IndexerConfig(num_heads=5, head_dim=16, top_k=8, rope="half-split", is_full=(True, True, True)),
    num_mtp_layers=1,
    fp8=Fp8Blocks(16, 16),
    bos_token_id=0,
    eos_token_ids=(1,),
)
GLM = replace(
    CONFIG,
    architecture="GlmMoeDsaForCausalLM",
    rope_scaling=None,
    indexer=replace(CONFIG.indexer, rope="interleaved", is_full=(True, False, True)),
)


@pytest.mark.parametrize("config", [CONFIG, GLM], ids=["deepseek", "glm"])
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16", "float32"])
def test_a_random_checkpoint_gives_sane_logits_in_transformers(
    tmp_path: Path, config: DeepseekConfig, dtype: StoredAs
) -> None:
    write_checkpoint(tmp_path, config, dtype=dtype, seed=3, num_shards=4)
    assert len(list(tmp_path.glob("model-0000?-of-000004.safetensors"))) == 4
    with torch.inference_mode():
        logits = oracle(tmp_path)(torch.arange(48)[None] % config.vocab_size).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3.0


def test_the_same_seed_gives_the_same_numbers_in_any_shards(tmp_path: Path) -> None:
    for folder, num_shards in (("a", 1), ("b", 3)):
        write_checkpoint(tmp_path / folder, CONFIG, seed=5, num_shards=num_shards)
    first, second = stored_tensors(tmp_path / "a"), stored_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(first["model.layers.3.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_the_configuration_comes_back_from_what_is_written(tmp_path: Path) -> None:
    for config in (CONFIG, GLM):
        write_checkpoint(tmp_path, config)
        assert DeepseekConfig.from_hf(json.loads((tmp_path / "config.json").read_bytes())) == config
