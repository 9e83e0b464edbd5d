"""From opened weights to a network that computes, whatever its family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from rempart_engine.config import EngineConfig
from rempart_engine.inputs import StepInputs
from rempart_engine.kv_storage import KVStorage, PoolShape
from rempart_engine.model import llama
from rempart_engine.model.deepseek.kv_pools import CacheDtype, kv_pools
from rempart_engine.model.deepseek.loading import load_deepseek
from rempart_engine.model.deepseek.model import Deepseek
from rempart_engine.model.deepseek.options import AttentionOptions
from rempart_engine.model.errors import ModelError
from rempart_engine.model.loading import load_llama
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder
from rempart_engine.model.weights.source import LlamaWeights, WeightsSource


class LanguageModel(Protocol):
    """Token ids of a step to hidden states, and hidden states to logits."""

    def __call__(self, step: StepInputs, storage: KVStorage) -> torch.Tensor:
        """Hidden states [T, W] of the step's tokens; their KV is in the storage afterwards."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[O, W] -> [O, V], of the token after each."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A model, and what it keeps per KV block."""

    model: LanguageModel
    drafter: Deepseek | None
    """The model itself, if it has an MTP layer to draft with."""
    pools: tuple[PoolShape, ...]


def load_network(
    source: WeightsSource,
    config: EngineConfig,
    precision: Precision,
    max_model_len: int,
    on_progress: Callable[[float], None],
) -> Network:
    """Read and pack all weights.

    Args:
        on_progress: told the fraction that is loaded, up to 1.

    Raises:
        ModelError: a tensor cannot be read, or the model has no such numbers as the configuration asks for.
        ValueError: the configuration asks for drafts that the model cannot make.
    """
    config.num_drafts_with(source.config.num_mtp_layers if isinstance(source, DeepseekFolder) else 0)
    if isinstance(source, DeepseekFolder):
        return _deepseek(source, config, precision, max_model_len, on_progress)
    return _llama(source, config, precision, max_model_len, on_progress)


def _llama(
    source: LlamaWeights,
    config: EngineConfig,
    precision: Precision,
    max_model_len: int,
    on_progress: Callable[[float], None],
) -> Network:
    for name, setting in (("dtype", config.dtype), ("kv_cache_dtype", config.kv_cache_dtype)):
        if setting == "fp8":
            raise ModelError(f"{name} fp8 is for fp8 checkpoints of DeepSeek models, this is a {source.architecture}")
    if precision.experts is not None:
        raise ModelError(f"dtype {precision.experts} is for routed experts on a GPU, this is a {source.architecture}")
    model = load_llama(source, precision, max_model_len, on_progress)
    return Network(model, None, llama.kv_pools(source.config, precision.dtype))


def _deepseek(
    source: DeepseekFolder,
    config: EngineConfig,
    precision: Precision,
    max_model_len: int,
    on_progress: Callable[[float], None],
) -> Network:
    if precision.keeps_fp8 and source.config.fp8 is None:
        raise ModelError(f"dtype fp8 is for fp8 checkpoints, and no weight of {config.model} is in fp8")
    if precision.placement.uses_triton and config.expand_prefill_from is not None:
        raise ModelError("expand_prefill_from is for CPUs")
    model = load_deepseek(
        source,
        precision,
        max_model_len,
        on_progress,
        load_mtp=config.num_speculative_tokens != 0,
        options=AttentionOptions(config.index_score_bytes, config.expand_prefill_from),
    )
    cache_dtype: CacheDtype = "fp8" if config.kv_cache_dtype == "fp8" else precision.dtype
    pools = kv_pools(source.config, int(model.mtp is not None), cache_dtype)
    if not precision.placement.uses_triton:
        with torch.inference_mode():
            model.compile_selection(KVStorage(pools, 1))
    return Network(model, None if model.mtp is None else model, pools)
