"""Hugging Face folders: one written by transformers, and the ways in which a folder can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rempart_engine.model.config import Llama3Scaling, LlamaConfig
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import expected_shapes
from rempart_engine.model.weights.source import open_llama, open_weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
Tensors = dict[str, torch.Tensor]


def tensors_for(folder: Path, **changes: Any) -> Tensors:
    """Write config.json and make the tensors that fit it, under Hugging Face's names."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    torch.manual_seed(0)
    shapes = expected_shapes(LlamaConfig.from_hf(CONFIG | changes))
    return {name if name == "lm_head.weight" else f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, *, without: str = "", extra: Tensors | None = None, **changes: Any) -> Tensors:
    tensors = tensors_for(folder, **changes)
    tensors.pop(without, None)
    tensors |= extra or {}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_sharded(folder: Path) -> tuple[Tensors, dict[str, str]]:
    tensors = tensors_for(folder)
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return tensors, weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(folder: Path, tensors: Tensors) -> None:
    source = open_llama(folder)
    loaded = dict(source.tensors(torch.float32))
    assert loaded.keys() == {name.removeprefix("model.") for name in tensors}
    assert source.num_tensors == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name.removeprefix("model.")], tensor), name


def test_a_folder_saved_by_transformers_loads(tmp_path: Path) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    hf_config = HFConfig(
        **{name: value for name, value in CONFIG.items() if name != "architectures"},
        rope_parameters=rope,
        tie_word_embeddings=True,
        attention_bias=True,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_config).bfloat16()
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path)
    source = open_llama(tmp_path)
    config = source.config
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert (config.rope_theta, config.rms_norm_eps, config.head_dim) == (5e5, 1e-5, 8)
    assert (config.eos_token_ids, config.attention_bias, config.tie_word_embeddings) == ((2, 3), True, True)
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    loaded = dict(source.tensors(torch.bfloat16))
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def test_one_file_and_shards_with_an_index_load_alike(tmp_path: Path) -> None:
    assert_same(tmp_path, write(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    tensors, _ = write_sharded(tmp_path)
    assert_same(tmp_path, tensors)


def test_one_file_under_any_name_loads(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert_same(tmp_path, tensors)


def test_files_that_the_index_does_not_list_are_not_read(tmp_path: Path) -> None:
    tensors, _ = write_sharded(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    assert_same(tmp_path, tensors)


def test_biases_and_names_without_the_prefix_load(tmp_path: Path) -> None:
    tensors = tensors_for(tmp_path, attention_bias=True, mlp_bias=True)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert_same(tmp_path, tensors)


def test_a_head_in_the_file_is_used_even_if_the_configuration_ties_it(tmp_path: Path) -> None:
    head = torch.randn(48, 32)
    write(tmp_path, tie_word_embeddings=True, extra={"lm_head.weight": head})
    source = open_llama(tmp_path)
    assert not source.config.tie_word_embeddings
    assert torch.equal(dict(source.tensors(torch.float32))["lm_head.weight"], head)


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors = write(tmp_path, extra=buffers)
    assert_same(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in buffers})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "model.norm.weight"}, r"missing norm\.weight"),
        ({"without": "lm_head.weight"}, r"missing lm_head\.weight"),
        ({"extra": {"model.layers.2.input_layernorm.weight": torch.ones(32)}}, r"unexpected layers\.2\.input_layer"),
        ({"extra": {"model.norm.weight": torch.ones(31)}}, r"norm\.weight is \[31\] instead of \[32\]"),
        ({"extra": {"norm.weight": torch.ones(32)}}, r"norm\.weight is there twice"),
        ({"extra": {"model.norm.weight": torch.ones(32, dtype=torch.int8)}}, "dtype I8"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path: Path, changes: Any, message: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "x.bin", 3])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    _, weight_map = write_sharded(tmp_path)
    write_index(tmp_path, weight_map | {"model.norm.weight": name})
    with pytest.raises(ModelError, match="not the plain name"):
        open_weights(tmp_path)


def test_an_index_that_does_not_match_its_files_is_refused(tmp_path: Path) -> None:
    _, weight_map = write_sharded(tmp_path)
    write_index(tmp_path, {name: file for name, file in weight_map.items() if name != "model.norm.weight"})
    with pytest.raises(ModelError, match="not those that"):
        open_weights(tmp_path)
    first_file = min(weight_map.values())
    write_index(tmp_path, {n: "absent.safetensors" if f == first_file else f for n, f in weight_map.items()})
    with pytest.raises(ModelError, match=r"absent\.safetensors"):
        open_weights(tmp_path)
    nothings: list[object] = [[], {}, None]
    for nothing in nothings:
        write_index(tmp_path, nothing)
        with pytest.raises(ModelError, match="weight_map"):
            open_weights(tmp_path)


def test_a_folder_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(ModelError, match="auto_map"):
        open_weights(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="holds 2 safetensors files"):
        open_weights(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"\xff" * 8 + whole[8:], whole + b"x"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    for config in ("", "[]", "{"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=r"config\.json"):
            open_weights(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        open_weights(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    pickled = tmp_path / "pytorch_model.bin"
    pickled.write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, pickled):
        with pytest.raises(ModelError, match="never loaded"):
            open_weights(path)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()
    for path, message in (
        (tmp_path / "absent", "no such file"),
        (tmp_path / "model.safetensors", "neither"),
    ):
        with pytest.raises(ModelError, match=message):
            open_weights(path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="holds neither"):
        open_weights(empty)
