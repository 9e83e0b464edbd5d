"""Each compiled kernel against its reference, with hostile inputs."""

import pytest
import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels import paged_attention as attention_op
from rempart_engine.kernels import quantize_rows as quantize_op
from rempart_engine.kernels import rms_norm as norm_op
from rempart_engine.kernels import sigmoid as sigmoid_op
from rempart_engine.kernels import silu_mul as silu_op
from rempart_engine.kernels import store_kv as store_op
from rempart_engine.kernels.int8_linear import Int8Linear
from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.kernels.paged_attention.reference import paged_attention as reference_attention
from rempart_engine.kernels.quantize_rows.reference import ZERO_POINT
from rempart_engine.kernels.quantize_rows.reference import quantize_rows as reference_quantize
from rempart_engine.kernels.rms_norm.reference import add_rms_norm as reference_norm
from rempart_engine.kernels.sigmoid.reference import sigmoid as reference_sigmoid
from rempart_engine.kernels.silu_mul.reference import silu_mul as reference_silu
from rempart_engine.kernels.store_kv.reference import rope_and_store_kv as reference_store
from rempart_engine.kernels.testing import make_step

BLOCK = 64
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Relative to the largest value: rounding of the result's own type."""

# (tokens of context with the new ones, new tokens) of each sequence in a step
STEPS = [
    pytest.param([(1, 1)], id="first token"),
    pytest.param([(64, 1), (65, 1), (192, 1)], id="decode on block borders"),
    pytest.param([(100, 100)], id="whole prompt"),
    pytest.param([(130, 17), (1, 1), (64, 64), (300, 5)], id="chunks and decode together"),
]


def make_pools(num_blocks: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(num_blocks, kv_heads, dim, BLOCK).to(dtype)
    return keys, torch.randn(num_blocks, kv_heads, BLOCK, dim).to(dtype)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    scale = expected.float().abs().max().item()
    assert (ours.float() - expected.float()).abs().max().item() <= TOLERANCE[ours.dtype] * max(scale, 1.0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 32), (8, 1, 128)])
def test_attention_equals_its_reference(
    dtype: torch.dtype, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int
) -> None:
    step = make_step(lengths, num_blocks=16)
    keys, values = make_pools(16, kv_heads, dim, dtype)
    q = torch.randn(len(step.positions), heads, dim).to(dtype)
    ours = attention_op.paged_attention(q, keys, values, step, dim**-0.5)
    assert_close(ours, reference_attention(q, keys, values, step, dim**-0.5))


def test_attention_sees_nothing_beyond_a_sequence_however_hostile() -> None:
    step = make_step([(70, 70)], num_blocks=4)
    keys, values = make_pools(4, 1, 64, torch.float32)
    q = torch.randn(70, 2, 64)
    clean = attention_op.paged_attention(q, keys, values, step, 0.125)
    used = step.block_tables[0].tolist()
    for block in range(4):  # every slot that no token of the sequence holds
        first_free = 0 if block not in used else (70 - BLOCK if block == used[1] else BLOCK)
        keys[block, :, :, first_free:] = torch.nan
        values[block, :, first_free:] = torch.nan
    assert torch.equal(attention_op.paged_attention(q, keys, values, step, 0.125), clean)


def test_attention_gives_the_same_bits_alone_chunked_and_in_company() -> None:
    keys, values = make_pools(16, 3, 64, torch.float32)
    together = make_step([(150, 150), (90, 1), (200, 33)], num_blocks=16)
    q = torch.randn(184, 9, 64)
    whole = attention_op.paged_attention(q, keys, values, together, 0.125)
    for start, stop in ((0, 150), (0, 7), (60, 61), (101, 150)):
        alone = make_step([(stop, stop - start)], num_blocks=16)
        blocks = torch.cat([together.block_tables[:1], torch.zeros(1, 1, dtype=torch.int32)], dim=1)
        alone = StepInputs(**{name: getattr(alone, name) for name in alone.__slots__} | {"block_tables": blocks})
        assert torch.equal(attention_op.paged_attention(q[start:stop], keys, values, alone, 0.125), whole[start:stop])


def test_attention_refuses_what_does_not_fit() -> None:
    step = make_step([(3, 3)], num_blocks=1)
    keys, values = make_pools(1, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        attention_op.paged_attention(torch.randn(3, 2, 32), keys, values, step, 1.0)
    with pytest.raises(ValueError, match="3 heads over 2"):
        attention_op.paged_attention(torch.randn(3, 3, 64), keys, values, step, 1.0)
    with pytest.raises(ValueError, match="types differ"):
        attention_op.paged_attention(torch.randn(3, 2, 64).bfloat16(), keys, values, step, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", STEPS)
def test_rope_and_store_equal_their_reference(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    step = make_step(lengths, num_blocks=16)
    qkv = torch.randn(len(step.positions), (9 + 2 * 3) * 64).to(dtype)
    angles = torch.outer(torch.arange(400).float(), torch.rand(32))
    ours, expected = make_pools(16, 3, 64, dtype), make_pools(16, 3, 64, dtype)
    for mine, theirs in zip(ours, expected, strict=True):
        theirs.copy_(mine)
    expected_q = reference_store(qkv.clone(), angles.cos(), angles.sin(), step, *expected)
    our_q = store_op.rope_and_store_kv(qkv, angles.cos(), angles.sin(), step, *ours)
    for mine, theirs in zip((our_q, *ours), (expected_q, *expected), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 33, 8])
def test_norm_equals_its_reference(dtype: torch.dtype, width: int) -> None:
    residual, delta, weight = torch.randn(5, width), torch.randn(5, width).to(dtype), torch.rand(width)
    other = residual.clone()
    assert_close(norm_op.add_rms_norm(residual, delta, weight, 1e-5), reference_norm(other, delta, weight, 1e-5))
    assert torch.equal(residual, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_equals_its_reference_up_to_extremes(dtype: torch.dtype) -> None:
    gate_up = torch.randn(7, 2 * 96).to(dtype) * 10
    gate_up[0, :4] = torch.tensor([1e30, -1e30, 0.0, -90.0])
    gate_up[0, 96:100] = 1.0
    assert_close(silu_op.silu_mul(gate_up), reference_silu(gate_up))


def test_one_row_of_nans_stays_one_row_of_nans() -> None:
    step = make_step([(5, 5), (6, 6)], num_blocks=4)
    keys, values = make_pools(4, 1, 64, torch.float32)
    q = torch.randn(11, 4, 64)
    clean = attention_op.paged_attention(q, keys, values, step, 0.125)
    q[3] = torch.nan
    poisoned = attention_op.paged_attention(q, keys, values, step, 0.125)
    assert poisoned[3].isnan().all()
    kept = [token for token in range(11) if token != 3]
    assert torch.equal(poisoned[kept], clean[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_equal_their_reference(dtype: torch.dtype) -> None:
    x = torch.randn(6, 99).to(dtype)
    x[1] = 0.0
    x[2, 98] = torch.nan
    x[3, 5] = torch.inf
    q, scales = quantize_op.quantize_rows(x)
    expected_q, expected_scales = reference_quantize(x)
    assert torch.equal(scales.isnan(), torch.tensor([False, False, True, True, False, False]))
    finite = ~expected_scales.isnan()
    assert torch.equal(scales[finite], expected_scales[finite])
    assert (q[finite].int() - expected_q[finite].int()).abs().max() <= 1  # a tie may round either way
    assert (q[1] == ZERO_POINT).all()


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 40)])
def test_int8_linear_is_near_and_the_same_in_any_company(bias: torch.Tensor | None) -> None:
    weight, x = torch.randn(40, 96) * 0.05, torch.randn(9, 96).bfloat16()
    layer = Int8Linear(weight, bias)
    exact = torch.nn.functional.linear(x.float(), weight, bias)
    assert (layer(x).float() - exact).norm() / exact.norm() < 0.02
    for count in (1, 2, 5):
        assert torch.equal(layer(x[:count]), layer(x)[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (64, 1536), (320, 576)])
def test_packed_linear_gives_the_same_bits_in_any_company(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    layer = PackedLinear((torch.randn(outputs, inputs) * 0.05).to(dtype))
    x = torch.randn(257, inputs).to(dtype)
    whole = layer(x)
    for start, stop in ((0, 1), (5, 6), (100, 102), (3, 20), (0, 64), (64, 129), (1, 257)):
        assert torch.equal(layer(x[start:stop].contiguous()), whole[start:stop])


def test_sigmoid_equals_its_reference_and_gives_the_same_bits_wherever_a_row_stands() -> None:
    for width in (1, 6, 16, 257):
        x = torch.randn(300, width) * 5
        whole = sigmoid_op.sigmoid(x)
        assert (whole - reference_sigmoid(x)).abs().max().item() < 3e-7
        for start, stop in ((0, 1), (7, 8), (3, 20), (299, 300)):
            assert torch.equal(sigmoid_op.sigmoid(x[start:stop]), whole[start:stop])
    extremes = sigmoid_op.sigmoid(torch.tensor([[torch.nan, torch.inf, -torch.inf, -200.0, 200.0]]))[0]
    assert extremes[0].isnan()
    assert (extremes[1:] - torch.tensor([1.0, 0.0, 0.0, 1.0])).abs().max().item() < 1e-30


def test_sigmoid_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="float32 matrix"):
        sigmoid_op.sigmoid(torch.randn(3, 3).double())
