"""fp8 blocks and the layers that compute with them, against their references."""

import pytest
import torch

from rempart_engine.kernels import fp8_blocks
from rempart_engine.kernels.fp8 import LARGEST
from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks, quantize_blocks
from rempart_engine.kernels.fp8_linear import Fp8Linear
from rempart_engine.kernels.fp8_linear.reference import fp8_linear

SHAPES = [
    (576, 256, (128, 128)),  # kv_a_proj_with_mqa: its last row of blocks is half
    (70, 33, (16, 16)),
    (31, 300, (128, 128)),
    (1, 1, (128, 128)),
    (40, 65, (3, 7)),
    (129, 130, (128, 64)),
]


def every_value() -> torch.Tensor:
    """All 256 bytes of e4m3 [16, 16], NaN and subnormals among them."""
    return torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizing_is_the_reference_rounded_once(
    rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    data, scales = quantize_blocks(torch.randn(rows, columns), block)
    assert torch.equal(
        fp8_blocks.dequantize_blocks(data, scales, block, dtype), dequantize_blocks(data, scales, block).to(dtype)
    )


def test_every_value_of_e4m3_is_read_right() -> None:
    scales = torch.tensor([[0.5, 3.0], [1e-30, 2.0**-100]])
    for dtype in (torch.float32, torch.bfloat16):
        got = fp8_blocks.dequantize_blocks(every_value(), scales, (8, 8), dtype)
        want = dequantize_blocks(every_value(), scales, (8, 8)).to(dtype)
        assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantizing_uses_the_whole_range_and_no_more(power_of_two: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 33) * 1e-3
    data, scales = quantize_blocks(weight, (16, 16), power_of_two=power_of_two)
    assert scales.shape == (5, 3)
    assert data.float().abs().max() <= LARGEST
    assert data.float().abs().max() > LARGEST / (2 if power_of_two else 1.1)
    error = (dequantize_blocks(data, scales, (16, 16)) - weight).abs()
    assert (error <= weight.abs() * 2**-4 + scales.max() * 2**-10).all()  # half a step of 3 bits, or of subnormals
    if power_of_two:
        assert torch.equal(scales.log2(), scales.log2().round())
        assert torch.equal(scales.to(torch.float8_e8m0fnu).float(), scales)
    assert quantize_blocks(torch.zeros(4, 4), (2, 2))[0].float().abs().max() == 0


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_layer_is_its_reference(
    rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(rows)
    data, scales = quantize_blocks(torch.randn(rows, columns) / columns**0.5, block)
    layer = Fp8Linear(data, scales, block)
    for num_tokens in (1, 5, 8, 20):
        x = torch.randn(num_tokens, columns).to(dtype)
        torch.testing.assert_close(layer(x), fp8_linear(x, data, scales, block), atol=tolerance, rtol=tolerance)
    assert layer(torch.empty(0, columns, dtype=dtype)).shape == (0, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    data, scales = quantize_blocks(torch.randn(130, 515), (128, 128))
    layer = Fp8Linear(data, scales, (128, 128))
    x = torch.randn(67, 515).to(dtype)
    together = layer(x)
    for num_tokens in (1, 2, 7, 8, 9, 64):
        assert torch.equal(layer(x[:num_tokens]), together[:num_tokens])
        assert torch.equal(layer(x[-num_tokens:]), together[-num_tokens:])


def test_a_row_that_is_not_finite_stays_alone() -> None:
    torch.manual_seed(2)
    data, scales = quantize_blocks(torch.randn(32, 48), (16, 16))
    layer = Fp8Linear(data, scales, (16, 16))
    x = torch.randn(4, 48)
    clean = layer(x)
    x[1, 5], x[2, 0] = torch.nan, torch.inf
    y = layer(x)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert not y[[1, 2]].isfinite().any()


def test_a_layer_keeps_what_it_was_given() -> None:
    data, scales = quantize_blocks(torch.randn(8, 8), (4, 4))
    layer = Fp8Linear(data, scales, (4, 4))
    x = torch.randn(2, 8)
    before = layer(x)
    data.view(torch.uint8).zero_()
    scales.zero_()
    assert torch.equal(layer(x), before)


def test_scales_that_do_not_cover_the_weight_are_refused() -> None:
    data, scales = quantize_blocks(torch.randn(20, 20), (16, 16))
    for wrong in (scales[:1], scales[:, :1], torch.ones(3, 2)):
        with pytest.raises(ValueError, match="do not cover"):
            Fp8Linear(data, wrong, (16, 16))
        with pytest.raises(ValueError, match="do not cover"):
            fp8_blocks.dequantize_blocks(data, wrong, (16, 16), torch.float32)
    with pytest.raises(ValueError, match="float32"):
        Fp8Linear(data.float(), scales, (16, 16))
