"""Where a model's weights come from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.deepseek.config import ARCHITECTURES
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder
from rempart_engine.model.weights.gguf_file import GGUFFile
from rempart_engine.model.weights.pickles import is_pickle
from rempart_engine.model.weights.safetensors_folder import SafetensorsFolder
from rempart_engine.model.weights.shards import read_json


class LlamaWeights(Protocol):
    """An opened Llama: its header is read and its tensors fit its configuration, name by name and shape by shape."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def architecture(self) -> str: ...

    @property
    def num_tensors(self) -> int: ...

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, under the names of `weights.names`, read and converted one by one.

        Raises:
            ModelError: a tensor cannot be read.
        """
        ...


WeightsSource = LlamaWeights | DeepseekFolder
"""An opened model. Each kind has its own way to be loaded: `model.loading`, `model.deepseek.loading`."""


def open_llama(path: Path) -> LlamaWeights:
    """`open_weights` where only a Llama will do.

    Raises:
        ModelError: there is no such model, it is not one that can be served, or not a Llama.
    """
    source = open_weights(path)
    if isinstance(source, DeepseekFolder):
        raise ModelError(f"{path}: is a {source.architecture}, not a Llama")
    return source


def open_weights(path: Path) -> WeightsSource:
    """Open a .gguf file, a folder of safetensors, or a folder with exactly one .gguf file.

    Raises:
        ModelError: there is no such model, or it is not one that can be served.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return GGUFFile(path)
    if is_pickle(path):
        raise ModelError(f"{path}: pickled weights can run code and are never loaded; convert them to safetensors")
    raise ModelError(f"{path}: neither a .gguf file nor a folder of safetensors")


def _open_folder(folder: Path) -> WeightsSource:
    if any(folder.glob("*.safetensors")):
        return DeepseekFolder(folder) if _is_deepseek(folder) else SafetensorsFolder(folder)
    gguf_files = sorted(folder.glob("*.gguf"))
    if len(gguf_files) == 1:
        return GGUFFile(gguf_files[0])
    if gguf_files:
        raise ModelError(f"{folder}: holds {len(gguf_files)} .gguf files; name one of them")
    if any(map(is_pickle, folder.iterdir())):
        raise ModelError(f"{folder}: holds pickled weights only, which can run code and are never loaded")
    raise ModelError(f"{folder}: holds neither *.safetensors nor a .gguf file")


def _is_deepseek(folder: Path) -> bool:
    named = read_json(folder / "config.json").get("architectures")
    return isinstance(named, list) and any(name in ARCHITECTURES for name in named if isinstance(name, str))
