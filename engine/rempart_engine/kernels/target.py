"""What kernels are made for, and whether it is Triton that runs them."""

import os
from dataclasses import dataclass
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter is asked for: the kernels for GPUs then compute tensors on the CPU, slowly, for tests."""


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of GPU."""

    capability: int
    """Compute capability times ten: 80 (A100), 90 (H100, H200), 100 (B200)."""
    num_multiprocessors: int

    @property
    def has_fp8(self) -> bool:
        """It converts and multiplies e4m3."""
        return self.capability >= 89

    @property
    def shared_bytes(self) -> int:
        """Most shared memory of one program."""
        return {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376}.get(self.capability, 232_448)


A100 = Target(80, 108)
H100 = Target(90, 132)
B200 = Target(100, 148)
SHIPPED = (A100, H100, B200)


def runs_triton(x: torch.Tensor) -> bool:
    """Whether Triton's kernels compute this tensor, not the CPU's."""
    return x.is_cuda or INTERPRETED


def target_of(x: torch.Tensor) -> Target:
    """The GPU on which the tensor lies; the interpreter passes for an H100."""
    return _target(x.device.index or 0) if x.is_cuda else H100


@cache
def _target(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    return Target(10 * found.major + found.minor, found.multi_processor_count)
