"""Residual add and RMS norm on the GPU path."""

import pytest
import torch

from rempart_engine.kernels.rms_norm import add_rms_norm, rms_norm
from rempart_engine.kernels.rms_norm.reference import add_rms_norm as reference

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_rounded_once(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Sums of float32, the result rounded once: half a step of its type, and a few of float32."""
    error = torch.finfo(ours.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert ((ours.double().cpu() - exact).abs() <= error * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 512, 7168])
def test_norm_is_that_of_the_new_residual(device: torch.device, dtype: torch.dtype, width: int) -> None:
    residual, delta, weight = torch.randn(3, width) * 9, torch.randn(3, width).to(dtype), torch.rand(width)
    ours = residual.clone().to(device)
    normed = add_rms_norm(ours, delta.to(device), weight.to(device), EPS)
    assert normed.dtype == dtype
    assert torch.equal(ours.cpu(), residual + delta.float())
    assert_rounded_once(normed, reference(residual.double(), delta.double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_alone_reads_columns_of_a_wider_matrix_and_writes_to_none_of_it(
    device: torch.device, dtype: torch.dtype
) -> None:
    wide, weight = torch.randn(4, 43).to(dtype), torch.rand(37)
    ours = wide.to(device)
    normed = rms_norm(ours[:, 3:40], weight.to(device), EPS)
    assert normed.is_contiguous()
    assert torch.equal(ours.cpu(), wide)
    columns = wide[:, 3:40].double()
    assert_rounded_once(normed, reference(torch.zeros(4, 37).double(), columns, weight.double(), EPS))


def test_rows_of_residual_and_delta_may_lie_apart(device: torch.device) -> None:
    residual, delta, weight = torch.randn(3, 50), torch.randn(3, 70), torch.rand(37)
    ours = residual.clone().to(device)
    normed = add_rms_norm(ours[:, 5:42], delta.to(device)[:, 30:67], weight.to(device), EPS)
    assert_rounded_once(normed, reference(residual[:, 5:42].double(), delta[:, 30:67].double(), weight.double(), EPS))
    expected = residual.clone()
    expected[:, 5:42] += delta[:, 30:67]
    assert torch.equal(ours.cpu(), expected)


def test_a_row_has_the_same_bits_alone_and_beside_one_of_nans(device: torch.device) -> None:
    x, weight = torch.randn(5, 300).bfloat16(), torch.rand(300).to(device)
    alone = rms_norm(x[2:3].to(device), weight, EPS)
    x[3] = torch.nan
    together = rms_norm(x.to(device), weight, EPS)
    assert torch.equal(together[2:3], alone)
    assert together[3].isnan().all()
    assert not together[:3].isnan().any()


def test_a_row_of_zeros_stays_and_no_rows_are_none(device: torch.device) -> None:
    weight = torch.rand(20).to(device)
    assert not rms_norm(torch.zeros(1, 20, device=device), weight, EPS).any()
    assert rms_norm(torch.zeros(0, 20, device=device), weight, EPS).shape == (0, 20)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight = torch.randn(4, 4, device=device), torch.rand(4, device=device)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x[:2], x, weight, EPS)
    with pytest.raises(ValueError, match=r"residual .*bfloat16"):
        add_rms_norm(x.bfloat16(), x, weight, EPS)
    with pytest.raises(ValueError, match="does not fit weights"):
        rms_norm(x, weight[:3], EPS)
    with pytest.raises(ValueError, match=r"weights .*bfloat16"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="side by side"):
        rms_norm(x.T, weight, EPS)
