"""Weights of a Hugging Face folder: config.json and one or more safetensors files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import Shape, check_tensors
from rempart_engine.model.weights.shards import read_configs, stored_tensors

_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_ROTARY_BUFFER = ".rotary_emb.inv_freq"  # old checkpoints carry it; it follows from the configuration


class SafetensorsFolder:
    """An opened folder.

    Raises:
        ModelError: a file is missing, damaged or of another model.
    """

    def __init__(self, folder: Path) -> None:
        config, generation = read_configs(folder)
        self._names: dict[Path, dict[str, str]] = {}  # file -> our name -> name in the file
        shapes: dict[str, Shape] = {}
        for tensor in stored_tensors(folder):
            if tensor.dtype not in _DTYPES:
                raise ModelError(
                    f"{tensor.file}: tensor {tensor.name} has dtype {tensor.dtype}, which is not supported"
                )
            if tensor.name.endswith(_ROTARY_BUFFER):
                continue
            ours = tensor.name.removeprefix("model.")
            if ours in shapes:
                raise ModelError(f"{tensor.file}: tensor {ours} is there twice")
            shapes[ours] = tensor.shape
            self._names.setdefault(tensor.file, {})[ours] = tensor.name
        self._config = LlamaConfig.from_hf(config, generation)
        if "lm_head.weight" in shapes:  # the file is the truth: a head that is there is used
            self._config = self._config.untied()
        check_tensors(self._config, shapes, str(folder))

    @property
    def config(self) -> LlamaConfig:
        return self._config

    @property
    def architecture(self) -> str:
        return "LlamaForCausalLM"

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self._names.values()))

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for file, names in self._names.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for ours, theirs in names.items():
                        yield ours, opened.get_tensor(theirs).to(dtype)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file}: {error}") from error
