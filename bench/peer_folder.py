"""The Hugging Face folder that peers load, so that all serve the same weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rempart_engine.model.config import LinearScaling, Llama3Scaling, LlamaConfig
from rempart_engine.model.weights.source import open_llama


def write_peer_folder(model: Path, folder: Path) -> None:
    """Writes a model's weights and configuration in float32: each peer casts them as it is told. No tokenizer.

    Raises:
        ModelError: there is no such model, or it is none of ours.
    """
    source = open_llama(model)
    tensors = {_hf_name(name): tensor.contiguous() for name, tensor in source.tensors(torch.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(source.config), indent=2))


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def hf_config(config: LlamaConfig) -> dict[str, object]:
    """The contents of config.json."""
    eos = config.eos_token_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope(config),
        "max_position_embeddings": config.max_model_len,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else next(iter(eos), None),
    }


def _rope(config: LlamaConfig) -> dict[str, object]:
    theta = {"rope_theta": config.rope_theta}
    match config.rope_scaling:
        case None:
            return {"rope_type": "default", **theta}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor, **theta}
        case Llama3Scaling() as scaling:
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                **theta,
            }
