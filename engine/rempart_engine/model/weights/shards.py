"""The safetensors files of a Hugging Face folder: what lies where, read from headers alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import Shape, listed

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    name: str
    """In the file."""
    shape: Shape
    dtype: str
    """As safetensors writes it: "BF16", "F32", "F8_E4M3"."""


def read_json(path: Path) -> Mapping[str, object]:
    """The object in a file.

    Raises:
        ModelError: there is no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def read_configs(folder: Path) -> tuple[Mapping[str, object], Mapping[str, object] | None]:
    """config.json, and generation_config.json if there is one.

    Raises:
        ModelError: one of them cannot be read.
    """
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.exists() else None


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of the folder, file by file. Names are unique.

    Raises:
        ModelError: a file is missing or damaged, does not hold what the index says, or repeats a tensor of another.
    """
    found: dict[str, StoredTensor] = {}
    for file, indexed in _files(folder).items():
        tensors = _headers(file)
        for tensor in tensors:
            if tensor.name in found:
                raise ModelError(f"{file}: tensor {tensor.name} is in {found[tensor.name].file.name} too")
            found[tensor.name] = tensor
        if indexed is not None and (differing := indexed ^ {tensor.name for tensor in tensors}):
            raise ModelError(f"{file}: its tensors are not those that {_INDEX} lists for it: {listed(differing)}")
    return list(found.values())


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
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / _INDEX}: weight_map is missing")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # A plain name stays inside the folder, whoever wrote the index.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / _INDEX}: {name!r} is not the plain name of a safetensors file")
        files.setdefault(folder / name, set()).add(tensor)
    return files


def _headers(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 -- not a mapping
            return [
                StoredTensor(file, name, tuple(header.get_shape()), header.get_dtype())
                for name, header in slices.items()
            ]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: {error}") from error
