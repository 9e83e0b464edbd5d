"""Products with fp8 weights on the GPU path, against their references in float64."""

import pytest
import torch

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks, quantize_blocks
from rempart_engine.kernels.fp8_linear.gpu import BlockFp8Linear
from rempart_engine.kernels.fp8_linear.kernel import _MOST_SPLIT_TOKENS, multiply, splits_for
from rempart_engine.kernels.quantize_groups.reference import dequantize_groups, quantize_groups
from rempart_engine.kernels.target import A100, H100, SHIPPED, Target

BLOCK = (128, 128)
SHAPES = [(256, 256), (96, 300), (129, 128), (1, 1), (70, 129)]
"""Outputs and inputs."""


def make_weights(num_outputs: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(num_outputs + width)
    data, scales = quantize_blocks(torch.randn(num_outputs, width), BLOCK)
    return data.to(device), scales.to(device)


def assert_is_product(got: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, *, is_fp8: bool) -> None:
    """Rounded once to x's type, from sums whose error is that of their terms in float32, or in fp8 tensor cores.

    Those keep 13 bits below the largest of the products that they add at once.
    """
    x64, w64 = x.cpu().double(), weights.double()
    want, size = x64 @ w64.T, x64.abs() @ w64.T.abs()
    rounding = torch.finfo(got.dtype).eps / 2
    bound = want.abs() * rounding * 1.01 + size * (2**-12 if is_fp8 and got.is_cuda else 2**-20)
    error = (got.cpu().double() - want).abs()
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("target", [A100, H100])
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, torch.bfloat16), (35, torch.bfloat16), (3, torch.float32)])
def test_product_is_the_references(
    target: Target, num_outputs: int, width: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    data, scales = make_weights(num_outputs, width, device)
    x = torch.randn(num_tokens, width).to(dtype)
    is_quantized = target.has_fp8 and dtype == torch.bfloat16
    got = multiply(x.to(device), data, scales, target)
    assert got.dtype == dtype
    taken = dequantize_groups(*quantize_groups(x)) if is_quantized else x
    assert_is_product(got, taken, dequantize_blocks(data.cpu(), scales.cpu(), BLOCK), is_fp8=is_quantized)


@pytest.mark.parametrize(("target", "width"), [(A100, 700), (H100, 256)])
def test_a_row_has_the_same_bits_in_any_company(target: Target, width: int, device: torch.device) -> None:
    """By every way to cut the product: small and large tiles, splits apart and in one program."""
    num_outputs, num_tokens = 24, _MOST_SPLIT_TOKENS + 1
    data, scales = make_weights(num_outputs, width, device)
    assert splits_for(target, num_outputs, width).count > 1
    x = torch.randn(num_tokens, width).bfloat16().to(device)
    x[9:] *= torch.linspace(0, 50, num_tokens - 9, device=device)[:, None]
    whole = multiply(x, data, scales, target)
    for count in (9, 33, 65):
        assert torch.equal(multiply(x[:count], data, scales, target), whole[:count])


@pytest.mark.parametrize("target", SHIPPED)
@pytest.mark.parametrize(("num_outputs", "width"), [(576, 7168), (1536, 7168), (24576, 1536), (7168, 18432), (1, 1)])
def test_splits_cover_every_group_once(target: Target, num_outputs: int, width: int) -> None:
    splits = splits_for(target, num_outputs, width)
    assert (splits.count - 1) * splits.groups < -(-width // 128) <= splits.count * splits.groups
    assert splits.count * -(-num_outputs // 64) <= 3 * target.num_multiprocessors or splits.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 128), (16, 16), (7, 5)])
def test_layer_takes_any_block_and_rows_that_lie_apart(
    dtype: torch.dtype, block: tuple[int, int], device: torch.device
) -> None:
    torch.manual_seed(3)
    data, scales = quantize_blocks(torch.randn(45, 60), block)
    layer = BlockFp8Linear(data, scales, block).to(device)
    assert (layer.out_features, layer.in_features) == (45, 60)
    x = torch.randn(5, 130).to(dtype)[:, 65:125]
    is_quantized = block == BLOCK and dtype == torch.bfloat16
    taken = dequantize_groups(*quantize_groups(x)) if is_quantized else x
    assert_is_product(layer(x.to(device)), taken, dequantize_blocks(data, scales, block), is_fp8=is_quantized)
    assert layer(x[:0].to(device)).shape == (0, 45)


@pytest.mark.parametrize("target", [A100, H100])
def test_every_value_of_e4m3_is_multiplied_right(target: Target, device: torch.device) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(2, 128)
    data[data & 0x7F == 0x7F] = 0  # NaN
    weights, scales = data.view(torch.float8_e4m3fn), torch.tensor([[0.5]])
    got = multiply(torch.eye(128, device=device), weights.to(device), scales.to(device), target)
    assert torch.equal(got.cpu(), weights.float().T * 0.5)


def test_a_token_that_is_no_number_spoils_no_other(device: torch.device) -> None:
    data, scales = make_weights(40, 256, device)
    x = torch.randn(6, 256, device=device).bfloat16()
    clean = multiply(x, data, scales)
    x[2, 200] = torch.nan
    spoiled = multiply(x, data, scales)
    assert spoiled[2].isnan().all()
    assert torch.equal(spoiled[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_wrong_shapes_and_types_are_named(device: torch.device) -> None:
    data, scales = make_weights(40, 256, device)
    with pytest.raises(ValueError, match="do not cover"):
        BlockFp8Linear(data, scales[:, :1], BLOCK)
    layer = BlockFp8Linear(data, scales, BLOCK)
    with pytest.raises(ValueError, match="256"):
        layer(torch.zeros(2, 255, device=device))
    with pytest.raises(ValueError, match="float16"):
        layer(torch.zeros(2, 256, device=device, dtype=torch.float16))
    with pytest.raises(ValueError, match="side by side"):
        layer(torch.zeros(256, 2, device=device).T)
