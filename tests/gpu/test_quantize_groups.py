"""Activations to e4m3, against the reference, bit for bit."""

import pytest
import torch

from rempart_engine.kernels.quantize_groups import quantize_groups
from rempart_engine.kernels.quantize_groups.kernel import quantize_groups as on_gpu
from rempart_engine.kernels.quantize_groups.reference import GROUP, dequantize_groups
from rempart_engine.kernels.quantize_groups.reference import quantize_groups as reference
from rempart_engine.kernels.target import A100, H100, Target


def hostile(num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups of every magnitude, zeros, and groups whose largest number falls on or beside a scale's limit."""
    torch.manual_seed(width)
    x = (
        torch.randn(num_tokens, width)
        * 2.0 ** torch.randint(-40, 40, (num_tokens, width // GROUP + 1)).repeat_interleave(GROUP, 1)[:, :width]
    )
    x[0] = 0
    x[-1, 0] = 448.0 * 2**30
    x[-1, min(width - 1, GROUP)] = torch.tensor(448.0).nextafter(torch.tensor(1e9)) * 2**31
    return x.to(dtype)


@pytest.mark.parametrize("target", [A100, H100])
@pytest.mark.parametrize(("num_tokens", "width"), [(3, 384), (2, 2200), (5, 129), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_scales_are_the_references(
    target: Target, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = hostile(num_tokens, width, dtype)
    values, scales = on_gpu(x.to(device), target)
    want_values, want_scales = reference(x)
    assert torch.equal(scales.cpu(), want_scales)
    assert torch.equal(values.cpu(), want_values)


def test_rounding_costs_half_a_step_of_three_bits(device: torch.device) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    values, scales = quantize_groups(x.to(device))
    error = (dequantize_groups(values.cpu(), scales.cpu()) - x).abs()
    assert (error <= x.abs() * 2**-4 + scales.cpu().max() * 2**-10).all()
    assert error.max() > 0


def test_rows_may_lie_apart_and_columns_not(device: torch.device) -> None:
    whole = hostile(4, 700, torch.bfloat16).to(device)
    apart = whole[:, 300:600]
    for got, want in zip(quantize_groups(apart), quantize_groups(apart.contiguous()), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="side by side"):
        quantize_groups(whole.T)
    with pytest.raises(ValueError, match="float16"):
        quantize_groups(whole.half())
    with pytest.raises(ValueError, match="700"):
        quantize_groups(whole[0])


def test_a_number_that_is_none_stays_in_its_group(device: torch.device) -> None:
    x = hostile(3, 384, torch.float32)
    x[1, 130] = torch.nan
    values, scales = (part.cpu() for part in quantize_groups(x.to(device)))
    got, clean = dequantize_groups(values, scales), torch.ones(3, 384, dtype=torch.bool)
    clean[1, 128:256] = False
    assert got[1, 130].isnan()
    assert torch.equal(got[clean], dequantize_groups(*reference(x))[clean])


def test_no_tokens_are_no_work(device: torch.device) -> None:
    values, scales = quantize_groups(torch.empty(0, 300, device=device))
    assert (values.shape, scales.shape) == ((0, 300), (0, 3))
