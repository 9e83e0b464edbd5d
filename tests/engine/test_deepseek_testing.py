"""The random checkpoints that other tests are built on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.testing import (
    TINY,
    TINY_GLM,
    StoredAs,
    oracle,
    store_checkpoint,
    stored_tensors,
    tensors_of,
    write_checkpoint,
)


@pytest.mark.parametrize("config", [TINY, TINY_GLM], ids=["deepseek", "glm"])
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
        write_checkpoint(tmp_path / folder, TINY, seed=5, num_shards=num_shards)
    first, second = stored_tensors(tmp_path / "a"), stored_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(first["model.layers.3.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_the_configuration_comes_back_from_what_is_written(tmp_path: Path) -> None:
    for config in (TINY, TINY_GLM):
        write_checkpoint(tmp_path, config)
        assert DeepseekConfig.from_hf(json.loads((tmp_path / "config.json").read_bytes())) == config


def test_an_oracle_can_be_stored_again(tmp_path: Path) -> None:
    plain = replace(TINY, num_mtp_layers=0)
    write_checkpoint(tmp_path / "a", plain, dtype="float32")
    tensors = tensors_of(oracle(tmp_path / "a"))
    store_checkpoint(tmp_path / "b", plain, lambda name, spec: tensors.pop(name), dtype="float32")
    assert not tensors
    first, second = stored_tensors(tmp_path / "a"), stored_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
