"""Gated activation on the GPU path."""

import pytest
import torch

from rempart_engine.kernels.silu_mul import silu_mul
from rempart_engine.kernels.silu_mul.reference import silu_mul as reference


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """The result is rounded once to its type; the exponential of a number up to 88 has an error of some 1e-5."""
    error = torch.finfo(ours.dtype).eps / 2 + 1e-5
    assert ((ours.double().cpu() - exact).abs() <= error * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 37, 1024, 2500])
def test_activation_equals_its_reference(device: torch.device, dtype: torch.dtype, width: int) -> None:
    gate_up = (torch.randn(3, 2 * width) * 10).to(dtype)
    ours = silu_mul(gate_up.to(device))
    assert ours.dtype == dtype
    assert ours.shape == (3, width)
    assert_near(ours, reference(gate_up.float()).double())


def test_extremes_neither_overflow_nor_spread(device: torch.device) -> None:
    gate = torch.tensor([[torch.nan, 1e30, -1e30, -90.0, -87.0, 0.0, 90.0]])
    ours = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1).to(device)).cpu()[0]
    assert ours[0].isnan()
    assert ours[1] == 1e30
    assert ours[2].abs() < 1e-7
    assert ours[3].abs() < 1e-35
    assert ours[4].abs() < 1e-35
    assert ours[5] == 0.0
    assert ours[6] == 90.0


def test_rows_may_lie_apart_and_be_none(device: torch.device) -> None:
    wide = torch.randn(4, 50)
    ours = silu_mul(wide.to(device)[:, 3:43])
    assert torch.equal(ours, silu_mul(wide[:, 3:43].contiguous().to(device)))
    assert silu_mul(torch.zeros(0, 8, device=device)).shape == (0, 4)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="odd width 7"):
        silu_mul(torch.randn(2, 7, device=device))
    with pytest.raises(ValueError, match="side by side"):
        silu_mul(torch.randn(8, 2, device=device).T)
