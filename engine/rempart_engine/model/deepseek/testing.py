"""Checkpoints in the published layout, random ones at any shapes, and `transformers` models of the same numbers."""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks, quantize_blocks
from rempart_engine.model.deepseek.config import DeepseekConfig, Fp8Blocks, IndexerConfig, MoEConfig, YarnScaling
from rempart_engine.model.deepseek.names import SCALE_SUFFIX, TensorSpec, expected_tensors, mtp_copies

StoredAs = Literal["fp8", "bfloat16", "float32"]
Values = Callable[[str, TensorSpec], torch.Tensor]
"""Name and look of a tensor, as `expected_tensors` has them, to its float32 values."""

_DTYPES = {"fp8": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ALWAYS_FLOAT32 = (".e_score_correction_bias", ".k_norm.weight", ".k_norm.bias")
_PUBLISHED_BLOCKS = Fp8Blocks(128, 128)

TINY = DeepseekConfig(
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
"""Small, and odd enough to catch mistakes: no dimension is another's, hardly one a multiple of the blocks."""
TINY_GLM = replace(
    TINY,
    architecture="GlmMoeDsaForCausalLM",
    rope_scaling=None,
    indexer=replace(TINY.indexer, rope="interleaved", is_full=(True, False, True)),
)
"""The same with what GLM changes: plain and interleaved rotary embedding, a layer without an indexer of its own."""


def write_checkpoint(
    folder: Path,
    config: DeepseekConfig,
    *,
    dtype: StoredAs = "fp8",
    seed: int = 0,
    num_shards: int = 2,
    ue8m0: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """`store_checkpoint` of `random_values`."""
    values = random_values(seed)
    store_checkpoint(folder, config, values, dtype=dtype, num_shards=num_shards, ue8m0=ue8m0, tokenizer=tokenizer)


def store_checkpoint(
    folder: Path,
    config: DeepseekConfig,
    values: Values,
    *,
    dtype: StoredAs = "fp8",
    num_shards: int = 2,
    ue8m0: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Write config.json, an index and shards of about equal size. Memory for one shard is needed.

    Args:
        values: asked for each of `expected_tensors` once, and once more where `mtp_copies` repeats one.
        dtype: of the tensors; with "fp8", of those that may be, with the configuration's blocks or 128 x 128.
        ue8m0: hold fp8 scales as powers of two, one byte each.
        tokenizer: a tokenizer.json to copy into the folder, with the tokenizer_config.json beside it if there is one.
    """
    config = replace(config, fp8=(config.fp8 or _PUBLISHED_BLOCKS) if dtype == "fp8" else None)
    folder.mkdir(parents=True, exist_ok=True)
    specs = expected_tensors(config)
    copies = mtp_copies(config)
    weight_map: dict[str, str] = {}
    shards = _in_shards(specs | {name: specs[original] for name, original in copies.items()}, num_shards)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, spec in shard.items():
            tensor = values(copies.get(name, name), spec)
            tensors |= _stored(_published(name), tensor, spec, config, dtype, ue8m0)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write_json(folder / "config.json", hf_config(config, ue8m0=ue8m0))
    if tokenizer is not None:
        for path in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
            if path == tokenizer or path.exists():
                shutil.copyfile(path, folder / path.name)


def random_values(seed: int) -> Values:
    """Numbers scaled so that logits are sane; those of a tensor follow from the seed and its name alone."""

    def values(name: str, spec: TensorSpec) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
        numbers = torch.randn(spec.shape, generator=generator)
        if len(spec.shape) == 1:
            return 0.1 * numbers if name.endswith("bias") else 1.0 + 0.1 * numbers
        return numbers if name == "embed_tokens.weight" else numbers / math.sqrt(spec.shape[1])

    return values


def hf_config(config: DeepseekConfig, *, ue8m0: bool = False) -> dict[str, Any]:
    """The config.json that says the same, with the fields that the published ones have."""
    moe, indexer = config.moe, config.indexer
    is_glm = config.architecture == "GlmMoeDsaForCausalLM"
    scaling = None if config.rope_scaling is None else {"type": "yarn", **asdict(config.rope_scaling)}
    fields: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": "glm_moe_dsa" if is_glm else "deepseek_v32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": config.num_dense_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_model_len,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "n_group": moe.num_groups,
        "topk_group": moe.num_chosen_groups,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "index_n_heads": indexer.num_heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.top_k,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    if is_glm:
        fields["indexer_rope_interleave"] = indexer.rope == "interleaved"
    if not all(indexer.is_full):
        fields["indexer_types"] = ["full" if is_full else "shared" for is_full in indexer.is_full]
    if config.fp8 is not None:
        fields["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [config.fp8.block_rows, config.fp8.block_columns],
            **({"scale_fmt": "ue8m0"} if ue8m0 else {}),
        }
    return fields


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under their published names, fp8 dequantized, in float32; the MTP layer too."""
    raw: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            raw |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- not a mapping
    config = json.loads((folder / "config.json").read_bytes())
    result = {}
    for name, tensor in raw.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = config["quantization_config"]["weight_block_size"]
            result[name] = dequantize_blocks(tensor, raw[name + SCALE_SUFFIX], (rows, columns))
        else:
            result[name] = tensor.to(torch.float32, copy=True)
    return result


def oracle(folder: Path) -> nn.Module:
    """The `transformers` model of a checkpoint: float32, eager attention, for evaluation. It has no MTP layer."""
    import transformers

    fields = json.loads((folder / "config.json").read_bytes())
    fields.pop("quantization_config", None)
    scaling, theta = fields.pop("rope_scaling") or {"type": "default"}, fields.pop("rope_theta")
    fields["rope_parameters"] = {"rope_type": scaling.pop("type"), "rope_theta": theta, **scaling}
    (architecture,) = fields["architectures"]
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    model_class = getattr(transformers, architecture)
    model: nn.Module = model_class._from_config(
        config_class(**fields),
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped product takes no odd sizes
        dtype=torch.float32,
    )
    model.load_state_dict(_as_in_transformers(stored_tensors(folder), fields["num_hidden_layers"]))
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The numbers of an `oracle`, under the names of `expected_tensors`; there are none of an MTP layer."""
    result: dict[str, torch.Tensor] = {}
    for published, tensor in model.state_dict().items():
        name = published.removeprefix("model.")
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for number, both in enumerate(tensor):
                gate, up = both.chunk(2)
                result[f"{prefix}.{number}.gate_proj.weight"] = gate
                result[f"{prefix}.{number}.up_proj.weight"] = up
        elif prefix.endswith(".experts"):
            result |= {f"{prefix}.{number}.down_proj.weight": down for number, down in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def _as_in_transformers(tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Without the MTP layer, and with the experts of a layer in one tensor."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"model.layers.{num_layers}.")}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = [name for name in plain if name.startswith(prefix)]
        if not experts:
            continue
        own = {name: plain.pop(name) for name in experts}
        numbers = range(len(own) // 3)
        gate, up, down = (
            torch.stack([own[f"{prefix}{number}.{kind}_proj.weight"] for number in numbers])
            for kind in ("gate", "up", "down")
        )
        plain[f"{prefix}gate_up_proj"] = torch.cat([gate, up], 1)
        plain[f"{prefix}down_proj"] = down
    return plain


def _in_shards(specs: Mapping[str, TensorSpec], num_shards: int) -> list[dict[str, TensorSpec]]:
    """Cut the tensors, in their order, where the numbers before have filled another shard."""
    total = sum(math.prod(spec.shape) for spec in specs.values())
    shards: list[dict[str, TensorSpec]] = [{} for _ in range(num_shards)]
    before = 0
    for name, spec in specs.items():
        shards[before * num_shards // total][name] = spec
        before += math.prod(spec.shape)
    return [shard for shard in shards if shard]


def _stored(
    name: str, values: torch.Tensor, spec: TensorSpec, config: DeepseekConfig, dtype: StoredAs, ue8m0: bool
) -> dict[str, torch.Tensor]:
    if config.fp8 is None or not spec.may_be_fp8:
        is_float32 = name.endswith(_ALWAYS_FLOAT32)
        return {name: values.to(torch.float32 if is_float32 else _DTYPES[dtype])}
    block = (config.fp8.block_rows, config.fp8.block_columns)
    data, scales = quantize_blocks(values, block, power_of_two=ue8m0)
    return {name: data, name + SCALE_SUFFIX: scales.to(torch.float8_e8m0fnu) if ue8m0 else scales}


def _published(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
