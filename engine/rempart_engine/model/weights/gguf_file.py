"""Weights of one GGUF file, dequantized as they are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, GGUFValueType, ReaderTensor, dequantize

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import Shape, check_tensors

_EMBEDDING = "token_embd.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_MODEL_TENSORS = {
    _EMBEDDING: "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """An opened file.

    Raises:
        ModelError: the file is damaged, a part of a split model, or of another model.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        reader, metadata = _read(path)
        if metadata.get("split.count", 1) not in (0, 1):
            raise ModelError(f"{path}: is one part of a split model; merge the parts first")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if _EMBEDDING not in tensors:
            raise ModelError(f"{path}: tensor {_EMBEDDING} is missing")
        factors = tensors.pop(_ROPE_FACTORS, None)
        config = LlamaConfig.from_gguf(
            metadata,
            vocab_size=_shape(tensors[_EMBEDDING])[0],
            rope_factors=None if factors is None else self._dequantized(factors).tolist(),
        )
        self._config = config.untied() if "output.weight" in tensors else config
        self._tensors = {_our_name(name): tensor for name, tensor in tensors.items()}
        check_tensors(self._config, {name: _shape(tensor) for name, tensor in self._tensors.items()}, str(path))

    @property
    def config(self) -> LlamaConfig:
        return self._config

    @property
    def architecture(self) -> str:
        return "LlamaForCausalLM"

    @property
    def num_tensors(self) -> int:
        return len(self._tensors)

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors.items():
            values = self._dequantized(tensor)
            if name.endswith("self_attn.q_proj.weight"):
                values = _halves_apart(values, self._config.num_heads)
            elif name.endswith("self_attn.k_proj.weight"):
                values = _halves_apart(values, self._config.num_kv_heads)
            yield name, torch.from_numpy(values).to(dtype)

    def _dequantized(self, tensor: ReaderTensor) -> npt.NDArray[np.float32]:
        """Values as float32, an array of their own."""
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise ModelError(f"{self._path}: tensor {tensor.name} of type {kind} cannot be read: {error}") from error
        return np.array(values, dtype=np.float32).reshape(_shape(tensor))


class _BoundedReader(GGUFReader):
    """Stops at the end of the file. The library's own reader goes on with empty values, for as long as a damaged
    count tells it to."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[np.generic]:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"the file ends before what is said to be at byte {offset}")
        values: npt.NDArray[np.generic] = super()._get(offset, dtype, count, override_order)
        return values


def _read(path: Path) -> tuple[GGUFReader, dict[str, object]]:
    try:
        reader = _BoundedReader(path)
        return reader, _scalars(reader)
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ModelError(f"{path}: is not a whole GGUF file: {error}") from error


def _scalars(reader: GGUFReader) -> dict[str, object]:
    """Key-value pairs without the arrays, which are the tokenizer's."""
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY
    }


def _shape(tensor: ReaderTensor) -> Shape:
    """Rows first; GGUF counts dimensions from the innermost."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _our_name(name: str) -> str:
    """Our name of a tensor; one that no model has for a tensor that is not known, to be refused under it."""
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name]
    match name.split("."):
        case ["blk", index, module, ("weight" | "bias") as kind] if module in _LAYER_MODULES:
            return f"layers.{index}.{_LAYER_MODULES[module]}.{kind}"
        case _:
            return f"gguf:{name}"


def _halves_apart(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo GGUF's order of a head's rows, in which rotary pairs are neighbours: rows i and i + D/2 pair up again."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
