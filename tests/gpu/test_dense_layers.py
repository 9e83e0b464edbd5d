"""Linear layers of the GPU path that call the device's library."""

import pytest
import torch

from rempart_engine.kernels.dense_linear import DenseLinear, WideLinear
from rempart_engine.kernels.headwise_linear import DenseHeadwiseLinear
from rempart_engine.kernels.headwise_linear.reference import headwise_linear

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
"""The largest relative error of one rounding."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(ours: torch.Tensor, exact: torch.Tensor, magnitudes: torch.Tensor, width: int) -> None:
    """Off by a float32 sum of `width` products, whose magnitudes add up as given, and by one rounding."""
    off_by_sum = width * 2**-24 * magnitudes
    allowed = off_by_sum + UNIT[ours.dtype] * (exact.abs() + off_by_sum)
    assert ((ours.cpu().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(3, 37, 18), (16, 32, 64)])
def test_headwise_linear_equals_its_reference(
    device: torch.device, dtype: torch.dtype, num_tokens: int, heads: int, inputs: int, outputs: int
) -> None:
    weight, x = torch.randn(heads, inputs, outputs).to(dtype), torch.randn(num_tokens, heads, inputs).to(dtype)
    ours = DenseHeadwiseLinear(weight.to(device))(x.to(device))
    assert ours.dtype == dtype
    assert ours.shape == (num_tokens, heads, outputs)
    assert ours.is_contiguous()
    exact = headwise_linear_in_double(x, weight)
    assert_near(ours, exact, headwise_linear_in_double(x.abs(), weight.abs()), inputs)
    assert torch.allclose(ours.cpu().float(), headwise_linear(x, weight).float(), rtol=2**-6, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_headwise_linear_reads_x_where_it_lies(device: torch.device, dtype: torch.dtype) -> None:
    weight, x = torch.randn(4, 24, 40).to(dtype).to(device), torch.randn(7, 4, 32).to(dtype).to(device)
    layer = DenseHeadwiseLinear(weight)
    for view in (x[..., :24], x[..., 8:], x.transpose(0, 1).contiguous().transpose(0, 1)[..., :24]):
        exact = headwise_linear_in_double(view.cpu(), weight.cpu())
        magnitudes = headwise_linear_in_double(view.cpu().abs(), weight.cpu().abs())
        assert_near(layer(view), exact, magnitudes, 24)


def headwise_linear_in_double(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thk,hkn->thn", x.double(), weight.double())


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_dense_linear_computes_in_its_type_and_answers_in_that_of_x(
    device: torch.device, dtype: torch.dtype, x_dtype: torch.dtype, has_bias: bool
) -> None:
    weight, x = torch.randn(50, 34).to(dtype), torch.randn(5, 34).to(x_dtype)
    bias = torch.randn(50) if has_bias else None
    layer = DenseLinear(weight.to(device), None if bias is None else bias.to(device))
    ours = layer(x.to(device))
    assert ours.dtype == x_dtype
    rounded, added = x.to(dtype), torch.zeros(50) if bias is None else bias.to(dtype)
    exact = torch.nn.functional.linear(rounded.double(), weight.double(), added.double())
    magnitudes = torch.nn.functional.linear(rounded.double().abs(), weight.double().abs(), added.double().abs())
    # Rounded in the weight's type before x's; with a bias perhaps once more in between.
    once = exact.abs() + 35 * 2**-24 * magnitudes
    allowed = 35 * 2**-24 * magnitudes + (UNIT[dtype] * (2 if has_bias else 1) + UNIT[x_dtype]) * once * (1 + 2**-7)
    if has_bias:
        allowed = allowed + UNIT[dtype] * added.double().abs()
    assert ((ours.cpu().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_linear_gives_float32(device: torch.device, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    weight, x = torch.randn(50, 300).to(dtype), torch.randn(5, 300).to(x_dtype)
    ours = WideLinear(weight.to(device))(x.to(device))
    assert ours.dtype == torch.float32
    exact = x.to(dtype).double() @ weight.double().t()
    assert_near(ours, exact, x.to(dtype).double().abs() @ weight.double().abs().t(), 300)
    if dtype == torch.bfloat16:
        assert (ours.bfloat16().float() != ours).any()


@pytest.mark.parametrize("layer", [DenseLinear, WideLinear])
def test_weights_are_kept_once(device: torch.device, layer: type[DenseLinear] | type[WideLinear]) -> None:
    weight = torch.randn(6, 4, device=device)
    assert layer(weight).weight.data_ptr() == weight.data_ptr()
