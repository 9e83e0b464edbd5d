"""Numbers on their way from the host to where tensors are computed."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(values: NDArray[Any] | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The same numbers on the device; on the CPU, the same memory.

    To a GPU they go by way of pinned memory, so that nobody waits for what the GPU is still computing.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
