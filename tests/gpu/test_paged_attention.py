"""Paged attention in Triton against its reference, with hostile inputs."""

from dataclasses import fields, replace

import pytest
import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels import paged_attention as op
from rempart_engine.kernels.paged_attention import kernel
from rempart_engine.kernels.paged_attention.reference import paged_attention as reference
from rempart_engine.kernels.target import A100, H100, SHIPPED, Target
from rempart_engine.kernels.testing import make_step

BLOCK = 64
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_pools(num_blocks: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(num_blocks, kv_heads, dim, BLOCK).to(dtype)
    return keys, torch.randn(num_blocks, kv_heads, BLOCK, dim).to(dtype)


def on(device: torch.device, step: StepInputs) -> StepInputs:
    tensors = {field.name: getattr(step, field.name) for field in fields(step) if field.name != "max_context"}
    return replace(step, **{name: tensor.to(device) for name, tensor in tensors.items()})


def assert_near(
    ours: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepInputs, scale: float
) -> None:
    """Equal to the reference in float32, but for two roundings where bfloat16 is the type.

    Each weight is rounded before it multiplies its value, which moves the mean by at most 2**-8 of the mean magnitude;
    then the result is rounded, by at most 2**-8 of itself.
    """
    assert ours.dtype == q.dtype
    finite = values.float().nan_to_num(0.0)
    expected = reference(q.float(), keys.float(), finite, step, scale)
    magnitudes = reference(q.float(), keys.float(), finite.abs(), step, scale)
    allowed = 1e-5 * magnitudes.clamp(min=1.0)
    if ours.dtype == torch.bfloat16:
        allowed = allowed + 2**-8 * magnitudes + 2**-8 * (expected.abs() + 2**-8 * magnitudes)
    excess = (ours.cpu().float() - expected).abs() - allowed
    assert excess.max().item() <= 0.0


def compute(
    device: torch.device,
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    step: StepInputs,
    scale: float,
    *,
    target: Target | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    keys, values = (pool.to(device) for pool in pools)
    moved = on(device, step)
    return kernel.paged_attention(q.to(device), keys, values, moved, scale, target=target, num_splits=num_splits).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (9, 3, 64), (8, 2, 128), (8, 1, 32)])
def test_decode_and_prefill_of_many_lengths(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    # Whole prompts, chunks after a prefix, single tokens: each ends before, on or after the border of a block.
    step = make_step([(1, 1), (63, 1), (64, 3), (65, 17), (200, 5), (129, 1), (20, 20)], num_blocks=16)
    pools = make_pools(16, kv_heads, dim, dtype)
    q = torch.randn(len(step.positions), heads, dim).to(dtype)
    keys, values = (pool.to(device) for pool in pools)
    ours = op.paged_attention(q.to(device), keys, values, on(device, step), dim**-0.5)
    assert_near(ours, q, *pools, step, dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_splits_of_single_tokens_add_up(
    device: torch.device, dtype: torch.dtype, target: Target, num_splits: int
) -> None:
    # Sequences of 1 to 5 blocks: with 5 splits, some have nothing to do.
    step = make_step([(1, 1), (64, 1), (65, 1), (200, 1), (300, 1)], num_blocks=16)
    pools = make_pools(16, 2, 64, dtype)
    q = torch.randn(5, 6, 64).to(dtype)
    ours = compute(device, q, pools, step, 0.125, target=target, num_splits=num_splits)
    assert_near(ours, q, *pools, step, 0.125)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_splits_of_chunks_add_up(device: torch.device, num_splits: int) -> None:
    # The first tokens of a chunk see nothing of the last split's blocks.
    step = make_step([(200, 17), (66, 4), (260, 6)], num_blocks=16)
    pools = make_pools(16, 1, 32, torch.float32)
    q = torch.randn(27, 4, 32)
    ours = compute(device, q, pools, step, 0.2, num_splits=num_splits)
    assert_near(ours, q, *pools, step, 0.2)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 4), (1, 1, 12), (5, 5, 20), (7, 1, 96), (4, 4, 192)])
def test_sizes_that_are_no_powers_of_two(device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
    step = make_step([(70, 18), (65, 1)], num_blocks=4)
    pools = make_pools(4, kv_heads, dim, torch.float32)
    q = torch.randn(19, heads, dim)
    for num_splits in (1, 2):
        ours = compute(device, q, pools, step, dim**-0.5, num_splits=num_splits)
        assert_near(ours, q, *pools, step, dim**-0.5)


def test_tiles_of_more_rows_than_a_program_takes(device: torch.device) -> None:
    step = make_step([(90, 16), (65, 2)], num_blocks=4)
    pools = make_pools(4, 1, 16, torch.bfloat16)
    q = torch.randn(18, 24, 16).bfloat16()
    ours = compute(device, q, pools, step, 0.25)
    assert kernel.config_for(H100, torch.bfloat16, 16, 24, 16).parts_per_tile == 3
    assert_near(ours, q, *pools, step, 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_read_where_they_lie(device: torch.device, dtype: torch.dtype) -> None:
    step = make_step([(20, 17), (65, 1)], num_blocks=4)
    pools = make_pools(4, 2, 32, dtype)
    qkv = torch.randn(18, 4 + 2 + 2, 32).to(dtype)
    ours = compute(device, qkv[:, :4], pools, step, 0.2)
    assert torch.equal(ours, compute(device, qkv[:, :4].clone(), pools, step, 0.2))
    assert_near(ours, qkv[:, :4], *pools, step, 0.2)
    by_heads = qkv.transpose(0, 1).contiguous().transpose(0, 1)[:, :4]
    assert torch.equal(ours, compute(device, by_heads, pools, step, 0.2))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_seen_beyond_a_sequence(device: torch.device, dtype: torch.dtype, num_splits: int) -> None:
    lengths = [(70, 70), (131, 1), (64, 2)]
    step = make_step(lengths, num_blocks=8)
    keys, values = make_pools(8, 1, 32, dtype)
    q = torch.randn(73, 3, 32).to(dtype)
    clean = compute(device, q, (keys, values), step, 0.2, num_splits=num_splits)
    unused = torch.ones(8, BLOCK, dtype=torch.bool)
    for table, (context, _) in zip(step.block_tables, lengths, strict=True):
        places = torch.arange(context)
        unused[table[places // BLOCK].long(), places % BLOCK] = False
    keys.masked_fill_(unused[:, None, None, :], torch.nan)
    values.masked_fill_(unused[:, None, :, None], torch.nan)
    # What follows in the tables belongs to nobody, and is not even a place in the pool.
    tables = torch.nn.functional.pad(step.block_tables, (0, 1))
    for table, (context, _) in zip(tables, lengths, strict=True):
        table[-(-context // BLOCK) :] = 2**31 - 1
    hostile = replace(step, block_tables=tables)
    assert torch.equal(compute(device, q, (keys, values), hostile, 0.2, num_splits=num_splits), clean)


def test_padding_rows_leave_others_alone(device: torch.device) -> None:
    # A graph of 8 rows serves 3 sequences: the others repeat position 0 of some row.
    keys, values = make_pools(8, 2, 32, torch.float32)
    served = make_step([(130, 1), (1, 1), (64, 1)], num_blocks=8)
    q = torch.randn(8, 4, 32)
    clean = compute(device, q[:3], (keys, values), served, 0.2, num_splits=2)
    pad = torch.nn.functional.pad
    padded = replace(
        served,
        positions=pad(served.positions, (0, 5)),
        token_rows=pad(served.token_rows, (0, 5)),
        slots=pad(served.slots, (0, 5), value=-1),
        block_tables=pad(served.block_tables, (0, 0, 0, 5)),
        tile_rows=torch.arange(8, dtype=torch.int32),
        tile_tokens=torch.arange(8, dtype=torch.int32),
        tile_sizes=torch.ones(8, dtype=torch.int32),
        max_context=64 * 40,  # of the graph, not of the step
    )
    ours = compute(device, q, (keys, values), padded, 0.2, num_splits=2)
    assert torch.equal(ours[:3], clean)
    assert ours.isfinite().all()


# The interpreter's maximum of a row that has no number.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_row_of_nans_stays_one_row(device: torch.device) -> None:
    step = make_step([(70, 5), (6, 6)], num_blocks=4)
    pools = make_pools(4, 1, 32, torch.float32)
    q = torch.randn(11, 4, 32)
    for num_splits in (1, 2):
        clean = compute(device, q, pools, step, 0.2, num_splits=num_splits)
        poisoned = q.clone()
        poisoned[3] = torch.nan
        ours = compute(device, poisoned, pools, step, 0.2, num_splits=num_splits)
        assert ours[3].isnan().all()
        kept = [token for token in range(11) if token != 3]
        assert torch.equal(ours[kept], clean[kept])


def test_large_scores_keep_their_order(device: torch.device) -> None:
    step = make_step([(130, 1)], num_blocks=4)
    pools = make_pools(4, 1, 16, torch.float32)
    q = torch.randn(1, 1, 16) * 1e4
    for num_splits in (1, 3):
        assert_near(compute(device, q, pools, step, 1.0, num_splits=num_splits), q, *pools, step, 1.0)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    step = on(device, make_step([(3, 3)], num_blocks=1))
    keys, values = (pool.to(device) for pool in make_pools(1, 2, 64, torch.float32))
    q = torch.randn(3, 2, 64, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        op.paged_attention(q[..., :32].contiguous(), keys, values, step, 1.0)
    with pytest.raises(ValueError, match="3 heads over 2"):
        op.paged_attention(torch.randn(3, 3, 64, device=device), keys, values, step, 1.0)
    with pytest.raises(ValueError, match="types differ"):
        op.paged_attention(q.bfloat16(), keys, values, step, 1.0)
    with pytest.raises(ValueError, match="must be contiguous"):
        op.paged_attention(q.transpose(1, 2).contiguous().transpose(1, 2), keys, values, step, 1.0)
    with pytest.raises(ValueError, match="must be contiguous"):
        op.paged_attention(q, keys.transpose(2, 3).contiguous().transpose(2, 3), values, step, 1.0)
    keys, values = (pool.to(device) for pool in make_pools(1, 1, 260, torch.float32))
    with pytest.raises(ValueError, match="head size 260 exceeds 256"):
        op.paged_attention(torch.randn(3, 1, 260, device=device), keys, values, step, 1.0)


@pytest.mark.parametrize("target", SHIPPED, ids=lambda target: f"sm_{target.capability}")
def test_splits_fill_a_gpu_and_no_more(target: Target) -> None:
    def splits(num_programs: int, context: int, *, single_tokens: bool = True) -> int:
        return kernel.num_splits_for(target, num_programs, context, single_tokens=single_tokens)

    assert splits(8, 100) == 1  # too short to share
    assert target.num_multiprocessors < 8 * splits(8, 131072) <= 2 * target.num_multiprocessors
    assert splits(1, 131072) == kernel.MOST_SPLITS
    assert splits(4096, 4096) == 1  # full already
    assert splits(4096, 131072) == 8  # but no program reads more than 16384 tokens
    assert splits(4096, 131072, single_tokens=False) == 1


def test_builds_give_every_argument() -> None:
    for target in SHIPPED:
        builds = list(kernel.builds(target))
        assert any(build.has_large_dot for build in builds)
        for build in builds:
            taken = set(build.arguments) | set(build.constants)
            assert taken == set(build.kernel.arg_names)
