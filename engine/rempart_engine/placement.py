"""Where tensors lie, and whose kernels compute them."""

from dataclasses import dataclass

import torch

from rempart_engine.config import DeviceName
from rempart_engine.kernels.target import INTERPRETED, target_of
from rempart_engine.model.errors import ModelError


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, and whether Triton's kernels compute on it."""

    device: torch.device
    uses_triton: bool

    @property
    def is_gpu(self) -> bool:
        """A real one: it has streams, graphs and memory of its own."""
        return self.device.type == "cuda"

    def __str__(self) -> str:
        if not self.uses_triton:
            return "kernels compiled for this CPU"
        if not self.is_gpu:
            return "Triton's kernels, interpreted on the CPU: for tests, thousands of times slower than a GPU"
        target = target_of(torch.empty(0, device=self.device))
        products = "multiplies fp8" if target.has_fp8 else "has no fp8 products: e4m3 is decoded, products are bfloat16"
        return (
            f"Triton's kernels on {torch.cuda.get_device_name(self.device)}, sm_{target.capability}, which {products}"
        )


ON_CPU = Placement(torch.device("cpu"), uses_triton=False)


def placement_named(name: DeviceName) -> Placement:
    """The placement of a name that operators choose.

    Raises:
        ModelError: there is no such device.
    """
    if name == "cpu":
        if INTERPRETED:
            raise ModelError("TRITON_INTERPRET=1 has the kernels for GPUs run on the CPU; device cpu has its own")
        return ON_CPU
    if INTERPRETED:
        return Placement(torch.device("cpu"), uses_triton=True)
    if not torch.cuda.is_available():
        raise ModelError("device cuda: this process sees no NVIDIA GPU, or its torch was built without CUDA")
    return Placement(torch.device("cuda", torch.cuda.current_device()), uses_triton=True)
