"""The GPU path: on a GPU where there is one, else in Triton's interpreter on CPU tensors."""

import os

import pytest
import torch

# Triton's default is about to change; products and sums are fused here, as on the GPU.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from rempart_engine.kernels.target import INTERPRETED, Target, target_of

if INTERPRETED:
    from tests.gpu.interpreter import patch_once_per_launch

    patch_once_per_launch()


def pytest_configure(config: pytest.Config) -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a GPU (make test-gpu) or Triton's interpreter (make test-triton)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What only a real GPU can show does not run in the interpreter, nor what needs fp8 on a GPU that has none."""
    lacks_fp8 = not INTERPRETED and not target_of(torch.empty(0, device="cuda")).has_fp8
    for item in items:
        if lacks_fp8 and _is_for_fp8(item):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that multiplies e4m3: sm_89 and later"))
        if INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: streams, graphs and memory are not interpreted"))


def _is_for_fp8(item: pytest.Item) -> bool:
    """The test is one of a parameter `target`, and this one multiplies e4m3."""
    parameters = getattr(item, "callspec", None)
    target = parameters.params.get("target") if parameters else None
    return isinstance(target, Target) and target.has_fp8


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors of these tests lie."""
    return torch.device("cpu" if INTERPRETED else "cuda")
