"""Arrays to the device in one copy, and tensors back, without anyone waiting."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

_ALIGNMENT = 16
"""Kernels read vectors of so many bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where arrays of these shapes lie in one buffer of bytes."""

    places: Mapping[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    num_bytes: int

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> "Layout":
        places, end = {}, 0
        for name, array in arrays.items():
            places[name] = (end, array.shape, array.dtype)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(places, max(end, _ALIGNMENT))

    def pack(self, arrays: Mapping[str, Array], device: torch.device) -> torch.Tensor:  # [num_bytes] uint8, on the host
        """A buffer that can be copied to the device without waiting."""
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        views = self.views(buffer)
        for name, array in arrays.items():
            views[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return buffer

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays as tensors in a packed buffer, wherever it lies."""
        result = {}
        for name, (start, shape, dtype) in self.places.items():
            part = buffer[start : start + prod(shape) * dtype.itemsize]
            result[name] = part.view(_TORCH_TYPES[dtype.name]).view(shape)
        return result


_TORCH_TYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.uint64,
    "float32": torch.float32,
    "float64": torch.float64,
    "bool": torch.bool,
}


def upload(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays on the device, by one copy that the host does not wait for."""
    layout = Layout.of(arrays)
    return layout.views(layout.pack(arrays, device).to(device, non_blocking=True))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, whose contents are there when a `Download` that was begun after it is."""
    return tensor.to("cpu", non_blocking=True)


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._host = {name: to_host(tensor) for name, tensor in tensors.items()}
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> dict[str, Array]:
        """The tensors as arrays, once all of them are there."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}
