"""DeepSeek folders: what is read from one that fits, and every way in which one is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rempart_engine.model.deepseek.config import DeepseekConfig, Fp8Blocks
from rempart_engine.model.deepseek.names import expected_tensors
from rempart_engine.model.deepseek.testing import TINY, TINY_GLM, StoredAs, oracle, stored_tensors, write_checkpoint
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder, WeightsBelow
from rempart_engine.model.weights.source import open_llama, open_weights

INDEX = "model.safetensors.index.json"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
Tensors = dict[str, torch.Tensor]


def open_deepseek(folder: Path) -> DeepseekFolder:
    source = open_weights(folder)
    assert isinstance(source, DeepseekFolder)
    return source


@pytest.mark.parametrize("config", [TINY, TINY_GLM, replace(TINY, num_mtp_layers=0)], ids=["deepseek", "glm", "no-mtp"])
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_every_tensor_is_read_as_it_was_written(
    tmp_path: Path, config: DeepseekConfig, dtype: StoredAs, ue8m0: bool
) -> None:
    write_checkpoint(tmp_path, config, dtype=dtype, num_shards=5, ue8m0=ue8m0)
    source = open_deepseek(tmp_path)
    assert source.config == replace(config, fp8=config.fp8 if dtype == "fp8" else None)
    assert source.architecture == config.architecture
    read: list[str] = []
    weights = source.weights(read.append)
    written = {name.removeprefix("model."): tensor for name, tensor in stored_tensors(tmp_path).items()}
    assert set(weights) == written.keys()
    assert written.keys() >= expected_tensors(config).keys()
    assert len(weights) == len(written)
    for name, tensor in written.items():
        weight = weights[name]
        assert weight.shape == tensor.shape
        assert torch.equal(weight.dequantized(torch.float32), tensor), name
        assert torch.equal(weight.dequantized(torch.bfloat16), tensor.bfloat16()), name
    assert read == list(written)
    is_fp8 = weights["layers.0.self_attn.kv_a_proj_with_mqa.weight"].data.dtype == torch.float8_e4m3fn
    assert is_fp8 is (dtype == "fp8")


def test_the_last_row_of_blocks_may_be_partial(tmp_path: Path) -> None:
    """As in the published kv_a_proj_with_mqa: 576 rows are 4 blocks and a half."""
    indexer = replace(TINY.indexer, head_dim=128)
    config = replace(TINY, kv_lora_rank=512, qk_rope_head_dim=64, indexer=indexer, fp8=Fp8Blocks(128, 128))
    write_checkpoint(tmp_path, config)
    weight = open_deepseek(tmp_path).weights()["layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert weight.scales is not None
    assert (weight.shape, weight.scales.shape) == ((576, 40), (5, 1))
    assert torch.equal(weight.dequantized(torch.float32), stored_tensors(tmp_path)[KV_A])


def test_a_layer_sees_its_weights_by_their_names_below_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    weights = open_deepseek(tmp_path).weights()
    layer = WeightsBelow(weights, "layers.1.")
    assert "mlp.gate.weight" in layer
    assert "mlp.gate_proj.weight" not in layer
    assert "self_attn.o_proj.weight_scale_inv" not in layer
    assert len(layer) == len(list(layer)) == 37
    assert torch.equal(layer["mlp.gate.weight"].data, weights["layers.1.mlp.gate.weight"].data)


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
def test_what_transformers_saves_loads(tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedModel

    config = replace(TINY if name == "DeepseekV32" else TINY_GLM, num_mtp_layers=0, fp8=None)
    write_checkpoint(tmp_path / "ours", config, dtype="float32")
    model = oracle(tmp_path / "ours")
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert open_deepseek(tmp_path / "theirs").config == config
    ours, theirs = (open_deepseek(tmp_path / folder).weights() for folder in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[tensor].data, theirs[tensor].data) for tensor in ours)


def test_copies_in_the_mtp_layer_may_be_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.3.embed_tokens.weight"))
    assert "layers.3.embed_tokens.weight" not in open_deepseek(tmp_path).weights()


def test_a_deepseek_folder_is_not_a_llama(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    with pytest.raises(ModelError, match="is a DeepseekV32ForCausalLM, not a Llama"):
        open_llama(tmp_path)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors and write them again, in one shard."""
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "all.safetensors")
    write_index(folder, dict.fromkeys(tensors, "all.safetensors"))


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def weight_map_of(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return weight_map


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def cut_last_shard(folder: Path, num_bytes: int) -> None:
    last = shards(folder)[-1]
    last.write_bytes(last.read_bytes()[:num_bytes])


def index_changed(folder: Path, **changes: str) -> None:
    write_index(folder, weight_map_of(folder) | {f"model.{name}": file for name, file in changes.items()})


def repeat_in_another_shard(folder: Path) -> None:
    first, second = shards(folder)
    tensors = load_file(second)
    save_file(tensors | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}, second)


def say_more_than_the_index(folder: Path) -> None:
    write_index(folder, {name: file for name, file in weight_map_of(folder).items() if name != KV_A})


def replace_shard_by_pointer(folder: Path) -> None:
    shards(folder)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def as_bfloat16_with_scales(tensors: Tensors) -> None:
    tensors[KV_A] = tensors[KV_A].to(torch.bfloat16)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        drop("model.layers.1.mlp.experts.3.up_proj.weight"),
        r"missing .*layers\.1\.mlp\.experts\.3\.up_proj\.weight",
    ),
    "missing bias": (drop("model.layers.2.mlp.gate.e_score_correction_bias"), r"missing layers\.2\.mlp\.gate\.e_score"),
    "missing scales": (
        drop(f"{KV_A}_scale_inv"),
        r"missing layers\.0\.self_attn\.kv_a_proj_with_mqa\.weight_scale_inv",
    ),
    "missing MTP tensor": (drop("model.layers.3.eh_proj.weight"), r"missing layers\.3\.eh_proj\.weight"),
    "missing MTP indexer": (
        drop("model.layers.3.self_attn.indexer.wk.weight"),
        r"missing layers\.3\.self_attn\.indexer",
    ),
    "extra tensor": (
        put("model.layers.0.self_attn.q_proj.weight", torch.ones(2)),
        r"unexpected layers\.0\.self_attn\.q_p",
    ),
    "extra expert": (
        put("model.layers.1.mlp.experts.6.up_proj.weight", torch.ones(20, 40)),
        r"unexpected .*experts\.6",
    ),
    "layer after the last": (put("model.layers.4.enorm.weight", torch.ones(40)), r"unexpected layers\.4\.enorm"),
    "MTP layer that nobody announced": (
        lambda folder: reconfigure(folder, num_nextn_predict_layers=0),
        r"unexpected layers\.3\..* more",
    ),
    "tensor under two names": (
        put("norm.weight", torch.ones(40)),
        r"all\.safetensors: tensor norm\.weight is there twice",
    ),
    "misshapen weight": (
        put("model.layers.1.self_attn.o_proj.weight", torch.ones(40, 19)),
        r"misshapen .*layers\.1\.self_attn\.o_proj\.weight is \[40, 19\] instead of \[40, 18\]",
    ),
    "misshapen scales": (
        put(f"{KV_A}_scale_inv", torch.ones(1, 3)),
        r"misshapen .*kv_a_proj_with_mqa\.weight_scale_inv is \[1, 3\] instead of \[2, 3\]",
    ),
    "misshapen copy": (
        put("model.layers.3.shared_head.head.weight", torch.ones(95, 40)),
        r"misshapen layers\.3\.shared_head\.head\.weight is \[95, 40\]",
    ),
    "scales of a norm": (
        put("model.norm.weight_scale_inv", torch.ones(1, 1)),
        r"unexpected norm\.weight_scale_inv",
    ),
    "scales of floats": (
        lambda folder: rewrite(folder, as_bfloat16_with_scales),
        r"unexpected layers\.0\.self_attn\.kv_a_proj_with_mqa\.weight_scale_inv",
    ),
    "integers": (
        put("model.norm.weight", torch.ones(40, dtype=torch.int8)),
        r"of the wrong type norm\.weight is I8",
    ),
    "the other fp8": (
        put(KV_A, torch.ones(24, 40).to(torch.float8_e5m2)),
        r"of the wrong type layers\.0\.self_attn\.kv_a_proj_with_mqa\.weight is F8_E5M2",
    ),
    "scales in half precision": (
        put(f"{KV_A}_scale_inv", torch.ones(2, 3).half()),
        r"of the wrong type layers\.0\.self_attn\.kv_a_proj_with_mqa\.weight_scale_inv is F16",
    ),
    "router in fp8": (
        put("model.layers.1.mlp.gate.weight", torch.ones(6, 40).to(torch.float8_e4m3fn)),
        r"layers\.1\.mlp\.gate\.weight is in fp8, which only projections may be",
    ),
    "fp8 that the configuration does not know": (
        lambda folder: reconfigure(folder, quantization_config=None),
        r"layers\.0\.mlp\.down_proj\.weight is in fp8, and config\.json has no quantization_config",
    ),
    "blocks of another size": (
        lambda folder: reconfigure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]}),
        r"misshapen layers\.0\.mlp\.down_proj\.weight_scale_inv",
    ),
    "truncated shard": (lambda folder: cut_last_shard(folder, -1), r"model-00002-of-000002\.safetensors"),
    "truncated header": (lambda folder: cut_last_shard(folder, 20), r"model-00002-of-000002\.safetensors"),
    "empty shard": (lambda folder: cut_last_shard(folder, 0), r"model-00002-of-000002\.safetensors"),
    "pointer instead of a shard": (replace_shard_by_pointer, r"model-00001-of-000002\.safetensors"),
    "missing shard": (lambda folder: shards(folder)[0].unlink(), r"model-00001-of-000002\.safetensors"),
    "index that leaves the folder": (
        lambda folder: index_changed(folder, **{"norm.weight": "../model-00001-of-000002.safetensors"}),
        r"'\.\./model-00001-of-000002\.safetensors' is not the plain name",
    ),
    "index that names a pickle": (
        lambda folder: index_changed(folder, **{"norm.weight": "pytorch_model.bin"}),
        r"'pytorch_model\.bin' is not the plain name",
    ),
    "index that knows more": (
        lambda folder: index_changed(folder, **{"more.weight": shards(folder)[0].name}),
        r"model-00001-of-000002\.safetensors: its tensors are not those .* model\.more\.weight",
    ),
    "index that knows less": (say_more_than_the_index, f"its tensors are not those .*{KV_A}"),
    "index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), INDEX),
    "no index": (lambda folder: (folder / INDEX).unlink(), "holds 2 safetensors files"),
    "tensor in two shards": (
        repeat_in_another_shard,
        r"00002\.safetensors: tensor model\.embed_tokens\.weight is in model-00001-of-000002\.safetensors too",
    ),
    "pickle beside": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), r"pytorch_model\.bin: pickled"),
    "code beside": (lambda folder: reconfigure(folder, auto_map={"AutoModel": "code.Model"}), "auto_map names code"),
    "unknown quantization": (
        lambda folder: reconfigure(folder, quantization_config={"quant_method": "gptq"}),
        r"quantization_config: quant_method must be 'fp8', got 'gptq'",
    ),
    "configuration of a deeper model": (
        lambda folder: reconfigure(folder, num_hidden_layers=4),
        r"missing .*layers\.3\.|missing layers\.4\.",
    ),
    "configuration that contradicts itself": (
        lambda folder: reconfigure(folder, mlp_layer_types=["sparse", "sparse", "sparse"]),
        "mlp_layer_types contradicts first_k_dense_replace = 1",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
}


@pytest.mark.parametrize("variant", BROKEN)
def test_a_broken_folder_is_refused_by_the_name_of_what_is_wrong(tmp_path: Path, variant: str) -> None:
    breaks, message = BROKEN[variant]
    write_checkpoint(tmp_path, TINY)
    open_weights(tmp_path)
    breaks(tmp_path)
    with pytest.raises(ModelError, match=message):
        open_weights(tmp_path)


def test_an_indexer_in_a_layer_that_shares_one_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_GLM)
    put("model.layers.1.self_attn.indexer.wk.weight", torch.ones(16, 40))(tmp_path)
    with pytest.raises(ModelError, match=r"unexpected layers\.1\.self_attn\.indexer\.wk\.weight"):
        open_weights(tmp_path)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_a_scale_that_is_no_positive_number_is_refused_when_it_is_read(tmp_path: Path, bad: float) -> None:
    write_checkpoint(tmp_path, TINY)
    scales = torch.ones(2, 3)
    scales[1, 2] = bad
    put(f"{KV_A}_scale_inv", scales)(tmp_path)
    weights = open_deepseek(tmp_path).weights()
    with pytest.raises(
        ModelError, match=r"all\.safetensors: tensor model\..*scale_inv must hold positive .* at \[1, 2\]"
    ):
        weights["layers.0.self_attn.kv_a_proj_with_mqa.weight"]


def test_a_ue8m0_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, ue8m0=True)
    nothing = torch.full((2, 3), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    put(f"{KV_A}_scale_inv", nothing)(tmp_path)
    with pytest.raises(ModelError, match="must hold positive numbers, got nan"):
        open_deepseek(tmp_path).weights()["layers.0.self_attn.kv_a_proj_with_mqa.weight"]


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_crash(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    weights = open_deepseek(tmp_path).weights()
    cut_last_shard(tmp_path, -1)
    with pytest.raises(ModelError, match=r"model-00002-of-000002\.safetensors"):
        weights["lm_head.weight"]
