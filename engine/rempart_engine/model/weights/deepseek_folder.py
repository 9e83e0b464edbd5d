"""Weights of a DeepSeek sparse-attention model in a Hugging Face folder, read where and when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.names import SCALE_SUFFIX
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.deepseek_tensors import check_tensors
from rempart_engine.model.weights.pickles import refuse_pickles
from rempart_engine.model.weights.shards import StoredTensor, read_configs, stored_tensors
from rempart_engine.model.weights.weight import Weight


class DeepseekFolder:
    """An opened folder: headers are read, and its tensors fit its configuration by name, shape and type.

    Raises:
        ModelError: a file is missing, damaged or of another model, or holds pickles.
    """

    def __init__(self, folder: Path) -> None:
        refuse_pickles(folder)
        self._config = DeepseekConfig.from_hf(*read_configs(folder))
        self._tensors: dict[str, StoredTensor] = {}
        for tensor in stored_tensors(folder):
            ours = tensor.name.removeprefix("model.")
            if ours in self._tensors:
                raise ModelError(f"{tensor.file}: tensor {ours} is there twice")
            self._tensors[ours] = tensor
        check_tensors(self._config, self._tensors, str(folder))

    @property
    def config(self) -> DeepseekConfig:
        return self._config

    @property
    def architecture(self) -> str:
        return self._config.architecture

    def weights(self, on_read: Callable[[str], None] = lambda name: None) -> "StoredWeights":
        """All weights, by our names.

        Args:
            on_read: told the name of each weight that was read.
        """
        blocks = self._config.fp8
        block = None if blocks is None else (blocks.block_rows, blocks.block_columns)
        return StoredWeights(self._tensors, block, on_read)


class StoredWeights(Mapping[str, Weight]):
    """Weights by name, each read from its file, into memory of its own, whenever it is looked up.

    Nothing is kept but one open file, so whoever walks over a model holds what they made of it and one weight.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        block: tuple[int, int] | None,
        on_read: Callable[[str], None],
    ) -> None:
        self._tensors = tensors
        self._names = [name for name in tensors if not name.endswith(SCALE_SUFFIX)]
        self._block = block
        self._on_read = on_read
        self._opened: tuple[Path, Any] | None = None

    def __getitem__(self, name: str) -> Weight:
        """Raises ModelError when the tensor cannot be read or a scale is not a positive number."""
        data = self._read(self._tensors[name])
        if (stored_scales := self._tensors.get(name + SCALE_SUFFIX)) is None:
            weight = Weight(data)
        else:
            weight = Weight(data, _checked(self._read(stored_scales), stored_scales), self._block)
        self._on_read(name)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors and not str(name).endswith(SCALE_SUFFIX)

    def _read(self, tensor: StoredTensor) -> torch.Tensor:
        try:
            if self._opened is None or self._opened[0] != tensor.file:
                # Mapped pages would count as ours until the whole file is closed, and a cut file would be our end.
                self._opened = (tensor.file, safe_open(tensor.file, framework="pt", backend="pread"))
            data: torch.Tensor = self._opened[1].get_tensor(tensor.name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{tensor.file}: {error}") from error
        return data


class WeightsBelow(Mapping[str, Weight]):
    """The weights whose names begin with a prefix, under what follows it."""

    def __init__(self, weights: Mapping[str, Weight], prefix: str) -> None:
        self._weights = weights
        self._prefix = prefix

    def __getitem__(self, name: str) -> Weight:
        return self._weights[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._weights if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._prefix + name in self._weights


def _checked(scales: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    scales = scales.float()
    bad = ~(scales.isfinite() & (scales > 0))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ModelError(
            f"{stored.file}: tensor {stored.name} must hold positive numbers, "
            f"got {scales[row, column].item():g} at [{row}, {column}]"
        )
    return scales
