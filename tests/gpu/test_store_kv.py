"""Rotary embedding and the write of keys and values on the GPU path."""

from dataclasses import fields, replace

import pytest
import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.store_kv import rope_and_store_kv
from rempart_engine.kernels.store_kv.reference import rope_and_store_kv as reference
from rempart_engine.kernels.testing import make_step

NUM_BLOCKS = 8
# Heads of queries, heads of keys, and their size.
SHAPES = [(9, 3, 64), (1, 1, 2), (5, 2, 10), (32, 8, 128)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def on(device: torch.device, step: StepInputs) -> StepInputs:
    tensors = {field.name: getattr(step, field.name) for field in fields(step) if field.name != "max_context"}
    return replace(step, **{name: tensor.to(device) for name, tensor in tensors.items()})


def nan_pools(heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.full((NUM_BLOCKS, heads, dim, 64), torch.nan, dtype=dtype)
    return keys, torch.full((NUM_BLOCKS, heads, 64, dim), torch.nan, dtype=dtype)


def assert_rounded_once(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Products and a sum in float32 of numbers below 5, the result rounded once to its type; NaN where it must be."""
    ours = ours.float().cpu()
    assert torch.equal(ours.isnan(), exact.isnan())
    error = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 20 * torch.finfo(torch.float32).eps
    assert ((ours - exact).abs() <= error)[~exact.isnan()].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_queries_keys_and_values_are_where_the_reference_has_them(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    step = make_step([(67, 4), (1, 1), (129, 1)], num_blocks=NUM_BLOCKS)
    qkv = torch.randn(6, (heads + 2 * kv_heads) * dim).clamp(-5, 5).to(dtype)
    angles = torch.outer(torch.arange(150).float(), torch.rand(dim // 2))
    cos, sin = angles.cos(), angles.sin()
    pools = [pool.to(device) for pool in nan_pools(kv_heads, dim, dtype)]
    ours_qkv = qkv.to(device, copy=True)
    queries = rope_and_store_kv(ours_qkv, cos.to(device), sin.to(device), on(device, step), pools[0], pools[1])
    exact_pools = nan_pools(kv_heads, dim, torch.float32)
    exact_queries = reference(qkv.float(), cos, sin, step, *exact_pools)
    assert queries.data_ptr() == ours_qkv.data_ptr()
    assert torch.equal(ours_qkv.cpu()[:, heads * dim :], qkv[:, heads * dim :])
    for ours, exact in zip((queries, *pools), (exact_queries, *exact_pools), strict=True):
        assert_rounded_once(ours, exact)


def test_padding_turns_its_queries_and_stores_nothing(device: torch.device) -> None:
    step = make_step([(67, 3), (1, 1)], num_blocks=NUM_BLOCKS)
    whole = replace(step, slots=step.slots.clone())
    step.slots[1], step.slots[3] = -1, -1
    qkv = torch.randn(4, (3 + 2 * 2) * 16)
    angles = torch.outer(torch.arange(150).float(), torch.rand(8))
    stored = []
    for each in (whole, step):
        pools = [pool.to(device) for pool in nan_pools(2, 16, torch.float32)]
        queries = rope_and_store_kv(
            qkv.to(device, copy=True), angles.cos().to(device), angles.sin().to(device), on(device, each), *pools
        )
        stored.append((queries, *pools))
    (all_queries, all_keys, all_values), (queries, keys, values) = stored
    assert torch.equal(queries, all_queries)
    for slot in whole.slots[[1, 3]].tolist():
        all_keys[slot // 64, :, :, slot % 64] = torch.nan
        all_values[slot // 64, :, slot % 64] = torch.nan
    for ours, expected in ((keys, all_keys), (values, all_values)):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    step = on(device, make_step([(3, 3)], num_blocks=NUM_BLOCKS))
    keys, values = (pool.to(device) for pool in nan_pools(2, 16, torch.float32))
    qkv, table = torch.zeros(3, 5 * 16, device=device), torch.ones(4, 8, device=device)
    with pytest.raises(ValueError, match="does not fit pool"):
        rope_and_store_kv(qkv[:, :-1], table, table, step, keys, values)
    with pytest.raises(ValueError, match="types differ"):
        rope_and_store_kv(qkv.bfloat16(), table, table, step, keys, values)
    with pytest.raises(ValueError, match="pools"):
        rope_and_store_kv(qkv, table, table, step, keys[:3], values)
    with pytest.raises(ValueError, match="contiguous"):
        rope_and_store_kv(torch.zeros(3, 2 * 5 * 16, device=device)[:, ::2], table, table, step, keys, values)
