"""Devices that are not there, and numbers that a device does not compute in."""

from pathlib import Path

import pytest
import torch

from rempart_engine.config import EngineConfig
from rempart_engine.model.errors import ModelError
from rempart_engine.model.precision import precision_named
from rempart_engine.offline import LLM
from rempart_engine.placement import ON_CPU, Placement, placement_named

INTERPRETED = Placement(torch.device("cpu"), uses_triton=True)


def test_the_cpu_has_kernels_of_its_own() -> None:
    assert placement_named("cpu") is ON_CPU
    assert "this CPU" in str(ON_CPU)
    assert "tests" in str(INTERPRETED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name(smollm2: Path) -> None:
    with pytest.raises(ModelError, match="device cuda: this process sees no NVIDIA GPU"):
        LLM(smollm2, device="cuda")


@pytest.mark.parametrize(
    ("name", "is_fp8_checkpoint", "expected"),
    [("auto", True, "fp8"), ("auto", False, "bfloat16"), ("int4", True, "int4"), ("float32", True, "float32")],
)
def test_precisions_of_a_gpu(name: str, is_fp8_checkpoint: bool, expected: str) -> None:
    precision = precision_named(name, INTERPRETED, is_fp8_checkpoint=is_fp8_checkpoint)
    assert precision.name == expected
    assert precision.dtype == (torch.float32 if expected == "float32" else torch.bfloat16)
    assert precision.keeps_fp8 is (expected == "fp8")
    assert precision.experts == ("int4" if expected == "int4" else None)


def test_int4_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="dtype int4 is for routed experts on a GPU"):
        precision_named("int4")


@pytest.mark.parametrize("fraction", [0.0, 1.1, -0.5])
def test_a_fraction_of_memory_lies_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match="gpu_memory_fraction"):
        EngineConfig(model=Path("m"), gpu_memory_fraction=fraction)
