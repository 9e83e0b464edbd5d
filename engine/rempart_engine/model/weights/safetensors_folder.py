"""Weights of a Hugging Face folder: config.json and one or more safetensors files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import Shape, check_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_ROTARY_BUFFER = ".rotary_emb.inv_freq"  # old checkpoints carry it; it follows from the configuration


class SafetensorsFolder:
    """An opened folder.

    Raises:
        ModelError: a file is missing, damaged or of another model.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else None
        self._names: dict[Path, dict[str, str]] = {}  # file -> our name -> name in the file
        shapes: dict[str, Shape] = {}
        for file, indexed in _files(folder).items():
            found = _shapes(file)
            if indexed is not None and indexed != found.keys():
                raise ModelError(f"{file}: its tensors are not those that {_INDEX} lists for it")
            self._names[file] = {}
            for name, shape in found.items():
                if name.endswith(_ROTARY_BUFFER):
                    continue
                ours = name.removeprefix("model.")
                if ours in shapes:
                    raise ModelError(f"{file}: tensor {ours} is there twice")
                shapes[ours] = shape
                self._names[file][ours] = name
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


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files to read, with the tensors that each must hold (None: any)."""
    if (folder / _INDEX).exists():
        return dict(_indexed_files(folder))
    if (folder / _SINGLE).exists():
        return {folder / _SINGLE: None}
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(f"{folder}: holds {len(files)} safetensors files and no {_INDEX}")
    return {files[0]: None}


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / _INDEX}: weight_map is missing")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # A plain name stays inside the folder, whoever wrote the index.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / _INDEX}: {name!r} is not the plain name of a safetensors file")
        files.setdefault(folder / name, set()).add(tensor)
    return files


def _shapes(file: Path) -> dict[str, Shape]:
    """Name and shape of every tensor in the file; reads the header only."""
    shapes = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a mapping
                header = opened.get_slice(name)
                if header.get_dtype() not in _DTYPES:
                    raise ModelError(f"{file}: tensor {name} has dtype {header.get_dtype()}, which is not supported")
                shapes[name] = tuple(header.get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: {error}") from error
    return shapes
