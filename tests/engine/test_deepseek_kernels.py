"""Kernels of sparse latent attention against their references, with hostile inputs; fp8 formats byte by byte."""

import math
import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numba import njit

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.cpu_scalars import load
from rempart_engine.kernels.cpu_tiles import read_e4m3_pairs
from rempart_engine.kernels.fp8 import e4m3_bytes, power_of_two_scales
from rempart_engine.kernels.headwise_linear import HeadwiseLinear
from rempart_engine.kernels.headwise_linear.reference import headwise_linear as reference_headwise
from rempart_engine.kernels.index_cache import fp8_pages, quantize_heads, read_index_keys, store_index_keys
from rempart_engine.kernels.latent_attention import latent_attention
from rempart_engine.kernels.latent_attention.reference import latent_attention as reference_attention
from rempart_engine.kernels.latent_cache import LatentLayout, read_latents, store_latents
from rempart_engine.kernels.rope import rotate
from rempart_engine.kernels.select_tokens import Selection, select_tokens
from rempart_engine.kernels.select_tokens.reference import select_tokens as reference_select
from rempart_engine.kernels.testing import make_step

FORMATS = ["float32", "bfloat16", "fp8 of float32", "fp8 of bfloat16"]
"""Of the pool, and of what is computed in."""
LATENT_DIM, ROPE_DIM, INDEX_DIM = 16, 8, 16
NUM_BLOCKS = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of values near 1: float32 sums in another order; bfloat16 rounds products' inputs, weights and results to 8 bits."""

# (tokens of context with the new ones, new tokens) of each sequence in a step
STEPS = [
    pytest.param([(1, 1)], id="first token"),
    pytest.param([(64, 1), (65, 1), (192, 1)], id="decode on block borders"),
    pytest.param([(100, 100)], id="whole prompt"),
    pytest.param([(130, 17), (1, 1), (64, 64), (300, 5)], id="chunks and decode together"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def computing(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind.endswith("bfloat16") else torch.float32


def latent_pool(kind: str, latent_dim: int = LATENT_DIM, rope_dim: int = ROPE_DIM) -> torch.Tensor:
    """Every slot holds a random record."""
    latents, rope_keys = torch.randn(64 * NUM_BLOCKS, latent_dim), torch.randn(64 * NUM_BLOCKS, rope_dim)
    if kind.startswith("fp8"):
        pool = torch.zeros(NUM_BLOCKS, 64, LatentLayout(latent_dim, rope_dim).num_bytes, dtype=torch.uint8)
    else:
        pool = torch.zeros(NUM_BLOCKS, 64, latent_dim + rope_dim, dtype=computing(kind))
    store_latents(latents, rope_keys, torch.arange(64 * NUM_BLOCKS), pool)
    return pool


def index_pool(kind: str, dim: int = INDEX_DIM) -> torch.Tensor:
    """Every slot holds a random key."""
    if kind.startswith("fp8"):
        pool = torch.zeros(NUM_BLOCKS, 64 * (dim + 4), dtype=torch.uint8)
    else:
        pool = torch.zeros(NUM_BLOCKS, 64, dim, dtype=computing(kind))
    store_index_keys(torch.randn(64 * NUM_BLOCKS, dim), torch.arange(64 * NUM_BLOCKS), pool)
    return pool


def random_selection(step: StepInputs, top_k: int) -> Selection:
    """As an indexer makes it: everything where there is no more, else `top_k` at random; rubbish beyond the counts."""
    positions = torch.full((len(step.positions), top_k), -1, dtype=torch.int32)
    counts = torch.empty(len(step.positions), dtype=torch.int32)
    for token, position in enumerate(step.positions.tolist()):
        counts[token] = min(top_k, position + 1)
        if position >= top_k:
            positions[token] = torch.randperm(position + 1)[:top_k].sort().values.int()
        else:
            positions[token] = torch.tensor([-1, 2**31 - 1, -(2**31)])[torch.arange(top_k) % 3]
    return Selection(positions, counts)


def queries_for(step: StepInputs, heads: int, *dims: int, kind: str) -> list[torch.Tensor]:
    return [torch.randn(len(step.positions), heads, dim).to(computing(kind)) for dim in dims]


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    scale = max(1.0, expected.float().abs().max().item())
    assert (ours.float() - expected.float()).abs().max().item() <= TOLERANCE[ours.dtype] * scale


# Attention.


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("lengths", STEPS)
@pytest.mark.parametrize("heads", [1, 3, 33, 130])
def test_attention_equals_its_reference(kind: str, lengths: list[tuple[int, int]], heads: int) -> None:
    step, pool = make_step(lengths, NUM_BLOCKS), latent_pool(kind)
    plain, turning = queries_for(step, heads, LATENT_DIM, ROPE_DIM, kind=kind)
    for selection in (Selection.of_everything(step), random_selection(step, 7), random_selection(step, 70)):
        ours = latent_attention(plain, turning, pool, step, selection, 0.2)
        assert_close(ours, reference_attention(plain, turning, pool, step, selection, 0.2))


@pytest.mark.parametrize(
    ("kind", "latent_dim", "rope_dim"),
    [
        ("float32", 37, 6),
        ("bfloat16", 37, 6),  # no pairs along an odd size: multiplied as float32
        ("fp8 of float32", 132, 6),  # a second scale for the last 4 latents
        ("fp8 of bfloat16", 132, 6),
    ],
)
def test_attention_takes_odd_sizes(kind: str, latent_dim: int, rope_dim: int) -> None:
    step, pool = make_step([(130, 17), (1, 1)], NUM_BLOCKS), latent_pool(kind, latent_dim, rope_dim)
    plain, turning = queries_for(step, 5, latent_dim, rope_dim, kind=kind)
    selection = random_selection(step, 70)
    ours = latent_attention(plain, turning, pool, step, selection, 0.2)
    assert_close(ours, reference_attention(plain, turning, pool, step, selection, 0.2))


@pytest.mark.parametrize("kind", FORMATS)
def test_attention_reads_chosen_slots_alone_however_hostile_the_others(kind: str) -> None:
    step, pool = make_step([(130, 3), (70, 70)], NUM_BLOCKS), latent_pool(kind)
    plain, turning = queries_for(step, 3, LATENT_DIM, ROPE_DIM, kind=kind)
    selection = random_selection(step, 7)
    clean = latent_attention(plain, turning, pool, step, selection, 0.2)
    is_read = torch.zeros(NUM_BLOCKS * 64, dtype=torch.bool)
    for token, position in enumerate(step.positions.tolist()):
        count = int(selection.counts[token])
        places = torch.arange(count) if count > position else selection.positions[token].long()
        is_read[step.block_tables[int(step.token_rows[token])].long()[places // 64] * 64 + places % 64] = True
    assert not is_read.all()
    unread = pool.view(NUM_BLOCKS * 64, -1)
    unread[~is_read] = torch.tensor(0xFF if kind.startswith("fp8") else torch.nan).to(pool.dtype)  # 0xFF.. is NaN too
    assert torch.equal(latent_attention(plain, turning, pool, step, selection, 0.2), clean)


@pytest.mark.parametrize("kind", FORMATS)
def test_attention_gives_the_same_bits_alone_and_in_company(kind: str) -> None:
    """Also where a short step takes the heads in smaller groups than a long one."""
    together, pool = make_step([(130, 40), (90, 1)], NUM_BLOCKS), latent_pool(kind)
    plain, turning = queries_for(together, 70, LATENT_DIM, ROPE_DIM, kind=kind)
    selection = random_selection(together, 33)
    whole = latent_attention(plain, turning, pool, together, selection, 0.2)
    for part in (slice(0, 1), slice(39, 40), slice(40, 41), slice(7, 30)):
        step = replace(together, positions=together.positions[part], token_rows=together.token_rows[part])
        chosen = Selection(selection.positions[part], selection.counts[part])
        assert torch.equal(latent_attention(plain[part], turning[part], pool, step, chosen, 0.2), whole[part])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_one_query_of_nans_stays_one(kind: str) -> None:
    step, pool = make_step([(5, 5), (6, 6)], NUM_BLOCKS), latent_pool(kind)
    plain, turning = queries_for(step, 3, LATENT_DIM, ROPE_DIM, kind=kind)
    selection = Selection.of_everything(step)
    clean = latent_attention(plain, turning, pool, step, selection, 0.2)
    plain[3] = torch.nan
    poisoned = latent_attention(plain, turning, pool, step, selection, 0.2)
    assert poisoned[3].isnan().all()
    kept = [token for token in range(11) if token != 3]
    assert torch.equal(poisoned[kept], clean[kept])


def test_attention_survives_scores_of_any_size() -> None:
    step, pool = make_step([(90, 90)], NUM_BLOCKS), latent_pool("float32")
    plain, turning = queries_for(step, 3, LATENT_DIM, ROPE_DIM, kind="float32")
    selection = Selection.of_everything(step)
    for size in (1e-20, 1e4, -1e4):
        ours = latent_attention(plain * size, turning * size, pool, step, selection, 1.0)
        assert_close(ours, reference_attention(plain * size, turning * size, pool, step, selection, 1.0))


def test_attention_refuses_what_does_not_fit() -> None:
    step, selection = make_step([(3, 3)], 1), Selection(torch.zeros(3, 0, dtype=torch.int32), torch.arange(1, 4).int())
    queries, rope = torch.randn(3, 2, LATENT_DIM), torch.randn(3, 2, ROPE_DIM)
    with pytest.raises(ValueError, match="does not fit latents of 16 and rotary keys of 8"):
        latent_attention(queries, rope, torch.zeros(1, 64, 23), step, selection, 1.0)
    with pytest.raises(ValueError, match="does not fit latents of 16 and rotary keys of 8"):
        latent_attention(queries, rope, torch.zeros(1, 64, 24, dtype=torch.uint8), step, selection, 1.0)
    with pytest.raises(ValueError, match="types differ"):
        latent_attention(queries, rope, torch.zeros(1, 64, 24, dtype=torch.bfloat16), step, selection, 1.0)
    with pytest.raises(ValueError, match="multiple of 4, rotary of 2: 18, 6"):
        LatentLayout(18, 6)
    with pytest.raises(ValueError, match="multiple of 4, rotary of 2: 16, 7"):
        LatentLayout(16, 7)


# Selection.


def assert_chosen(ours: Selection, expected: list[torch.Tensor], step: StepInputs) -> None:
    for token, (position, places) in enumerate(zip(step.positions.tolist(), expected, strict=True)):
        count = int(ours.counts[token])
        assert count == len(places)
        if count <= position:
            assert ours.positions[token, :count].tolist() == places.tolist()


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small ones, whose sums of products are exact in any order, and often equal."""
    return torch.randint(-2, 3, shape).float()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("lengths", STEPS)
@pytest.mark.parametrize("heads", [1, 5, 33, 64])
def test_selection_equals_its_reference_with_many_ties(kind: str, lengths: list[tuple[int, int]], heads: int) -> None:
    """Numbers are whole, so scores are exact and many are equal: of those the earliest win. Weights of both signs."""
    step, pool = make_step(lengths, NUM_BLOCKS), index_pool(kind)
    store_index_keys(whole_numbers(64 * NUM_BLOCKS, INDEX_DIM), torch.arange(64 * NUM_BLOCKS), pool)
    queries = whole_numbers(len(step.positions), heads, INDEX_DIM).to(computing(kind))
    weights = whole_numbers(len(step.positions), heads)
    for top_k in (1, 8, 70):
        ours = select_tokens(queries, weights, pool, step, top_k, 1 << 20)
        assert_chosen(ours, reference_select(queries, weights, pool, step, top_k), step)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dim", [INDEX_DIM, 20])
def test_scores_of_chosen_tokens_are_the_largest(kind: str, dim: int) -> None:
    """Random numbers: where the reference chooses another token, its score differs by rounding alone."""
    step, pool = make_step([(300, 20), (70, 3)], NUM_BLOCKS), index_pool(kind, dim)
    queries = torch.randn(len(step.positions), 5, dim).to(computing(kind))
    weights = torch.randn(len(step.positions), 5)
    ours = select_tokens(queries, weights, pool, step, 33, 1 << 20)
    if kind.startswith("fp8"):
        values, scales = quantize_heads(queries)
        queries = values.view(torch.float8_e4m3fn).float() * scales[..., None]
    expected = reference_select(queries, weights, pool, step, 33)
    same = [set(ours.positions[token].tolist()) == set(places.tolist()) for token, places in enumerate(expected)]
    assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("kind", ["float32", "fp8 of bfloat16"])
def test_of_equal_scores_the_earliest_win(kind: str) -> None:
    step = make_step([(300, 2)], NUM_BLOCKS)
    pool, weights = index_pool(kind), torch.ones(2, 3)
    queries = torch.ones(2, 3, INDEX_DIM).to(computing(kind))
    zero_weights = select_tokens(queries, torch.zeros(2, 3), pool, step, 8, 1 << 20)
    assert zero_weights.positions.tolist() == [list(range(8))] * 2
    store_index_keys(torch.full((64 * NUM_BLOCKS, INDEX_DIM), 0.5), torch.arange(64 * NUM_BLOCKS), pool)
    for sign in (1.0, -1.0):  # all equal, all negative
        selection = select_tokens(queries, sign * weights, pool, step, 8, 1 << 20)
        assert selection.positions.tolist() == [list(range(8))] * 2
    best = step.block_tables[0].long()[torch.tensor([4, 1])] * 64 + torch.tensor([20, 3])
    store_index_keys(torch.ones(2, INDEX_DIM), best, pool)
    selection = select_tokens(queries, weights, pool, step, 4, 1 << 20)
    assert selection.positions.tolist() == [[0, 1, 67, 276]] * 2


@pytest.mark.parametrize("kind", FORMATS)
def test_a_small_budget_for_scores_changes_nothing(kind: str) -> None:
    """From one query at a time up to all."""
    step, pool = make_step([(300, 40), (9, 9), (200, 7)], NUM_BLOCKS), index_pool(kind)
    queries = torch.randn(len(step.positions), 5, INDEX_DIM).to(computing(kind))
    weights = torch.randn(len(step.positions), 5)
    whole = select_tokens(queries, weights, pool, step, 16, 1 << 20)
    for score_bytes in (1, 4 * 300, 4 * 300 * 7):
        part = select_tokens(queries, weights, pool, step, 16, score_bytes)
        assert torch.equal(part.counts, whole.counts)
        needing = step.positions >= 16
        assert torch.equal(part.positions[needing], whole.positions[needing])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_selection_sees_nothing_beyond_a_sequence(kind: str) -> None:
    step, pool = make_step([(70, 70), (130, 1)], NUM_BLOCKS), index_pool(kind)
    queries = torch.randn(71, 5, INDEX_DIM).to(computing(kind))
    weights = torch.randn(71, 5)
    clean = select_tokens(queries, weights, pool, step, 8, 1 << 20)
    slots = torch.cat(
        [
            step.block_tables[row].long()[places // 64] * 64 + places % 64
            for row, places in ((0, torch.arange(70)), (1, torch.arange(130)))
        ]
    )
    is_used = torch.zeros(NUM_BLOCKS * 64, dtype=torch.bool)
    is_used[slots] = True
    pool.view(-1, INDEX_DIM)[~is_used] = torch.nan
    poisoned = select_tokens(queries, weights, pool, step, 8, 1 << 20)
    assert torch.equal(poisoned.counts, clean.counts)
    needing = step.positions >= 8
    assert torch.equal(poisoned.positions[needing], clean.positions[needing])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_harms_no_other(kind: str, poison: float) -> None:
    """What it chooses itself is within its sequence, and at most top-k."""
    step, pool = make_step([(300, 20)], NUM_BLOCKS), index_pool(kind)
    queries = torch.randn(20, 5, INDEX_DIM).to(computing(kind))
    weights = torch.randn(20, 5)
    clean = select_tokens(queries, weights, pool, step, 16, 1 << 20)
    queries[4] = poison
    weights[7] = poison
    poisoned = select_tokens(queries, weights, pool, step, 16, 1 << 20)
    kept = [token for token in range(20) if token not in (4, 7)]
    assert torch.equal(poisoned.positions[kept], clean.positions[kept])
    for token in (4, 7):
        count = int(poisoned.counts[token])
        places = poisoned.positions[token, :count].tolist()
        assert 0 <= count <= 16
        assert places == sorted(set(places))
        assert all(0 <= place <= int(step.positions[token]) for place in places)


def test_selection_refuses_what_does_not_fit() -> None:
    step = make_step([(3, 3)], 1)
    queries, weights, pool = torch.randn(3, 2, 16), torch.randn(3, 2), torch.zeros(1, 64, 16)
    with pytest.raises(ValueError, match=r"weights \(3, 1\) do not fit queries \(3, 2, 16\)"):
        select_tokens(queries, weights[:, :1], pool, step, 8, 1)
    with pytest.raises(ValueError, match="weights"):
        select_tokens(queries, weights.bfloat16(), pool, step, 8, 1)
    with pytest.raises(ValueError, match=r"pool \(1, 64, 16\) of torch.bfloat16 does not fit"):
        select_tokens(queries, weights, pool.bfloat16(), step, 8, 1)
    with pytest.raises(ValueError, match=r"pool \(1, 64, 8\) of torch.float32 does not fit"):
        select_tokens(queries, weights, pool[..., :8], step, 8, 1)
    with pytest.raises(ValueError, match=r"a page of keys of 16 has 1280 bytes, got \(1, 1281\)"):
        select_tokens(queries, weights, torch.zeros(1, 1281, dtype=torch.uint8), step, 8, 1)


# Projections per head, and rotation.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(1, 10, 16), (3, 17, 6), (130, 6, 33), (5, 64, 64)])
def test_headwise_linear_equals_its_reference(dtype: torch.dtype, heads: int, inputs: int, outputs: int) -> None:
    weight = (torch.randn(heads, inputs, outputs) / math.sqrt(inputs)).to(dtype)
    layer, x = HeadwiseLinear(weight), torch.randn(21, heads, inputs).to(dtype)
    whole = layer(x)
    assert_close(whole, reference_headwise(x, weight))
    for part in (slice(0, 1), slice(20, 21), slice(3, 12)):
        assert torch.equal(layer(x[part]), whole[part])
    x[5, 0] = torch.nan
    poisoned = layer(x)
    assert poisoned[5, 0].isnan().all()
    poisoned[5, 0] = whole[5, 0]
    assert torch.equal(poisoned, whole)


@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
def test_rotation_turns_each_pair_by_its_own_angle(layout: str) -> None:
    """Pair by pair as complex numbers, in double precision; what is beyond the rotary dimensions stays."""
    x, angles = torch.randn(7, 3, 11), torch.rand(7, 4) * 6
    turned = rotate(x, (angles.cos(), angles.sin()), "half-split" if layout == "half-split" else "interleaved")
    for token in range(7):
        for head in range(3):
            for pair in range(4):
                first, second = (pair, pair + 4) if layout == "half-split" else (2 * pair, 2 * pair + 1)
                number = complex(x[token, head, first], x[token, head, second])
                expected = number * complex(math.cos(angles[token, pair]), math.sin(angles[token, pair]))
                assert float(turned[token, head, first]) == pytest.approx(expected.real, abs=1e-6)
                assert float(turned[token, head, second]) == pytest.approx(expected.imag, abs=1e-6)
    assert torch.equal(turned[..., 8:], x[..., 8:])


# Formats.


def e4m3_value(byte: int) -> float:
    """OCP 8-bit floating point: sign, 4 bits of exponent with bias 7, 3 of fraction; no infinities, one NaN a sign."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    magnitude = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return sign * magnitude


E4M3 = [e4m3_value(byte) for byte in range(0x7F)]
"""Non-negative finite numbers, ascending; a number's index is its byte."""


def nearest_byte(value: float) -> int:
    """Of e4m3, by looking at all of them; of two equally near the one with an even fraction; beyond 448 the last."""
    best = min(range(0x7F), key=lambda byte: (abs(E4M3[byte] - abs(value)), byte & 1))
    return best | (0x80 if math.copysign(1.0, value) < 0 else 0)


def scale_for(values: list[float], least_amax: float) -> float:
    """By trying powers of two from below: the first under which the largest number is at most 448."""
    needed, scale = max(*(abs(value) for value in values), least_amax) / 448.0, 2.0**-40
    while scale < needed:
        scale *= 2.0
    return scale


@njit
def decode(stored, out):  # type: ignore[no-untyped-def]
    for i in range(stored.shape[0]):
        out[i] = load(stored[i])


@njit
def _read_pairs(values, first, pairs):  # type: ignore[no-untyped-def]  # numba infers
    read_e4m3_pairs(values, first, pairs)


def test_every_e4m3_byte_is_read_as_torch_and_the_format_say() -> None:
    stored = torch.arange(256).to(torch.uint8)
    ours = np.empty(256, np.float32)
    decode(stored.numpy(), ours)
    theirs = stored.view(torch.float8_e4m3fn).float().numpy()
    by_hand = np.array([e4m3_value(byte) for byte in range(256)], np.float32)
    for expected in (theirs, by_hand):
        assert np.array_equal(np.isnan(ours), np.isnan(expected))
        finite = ~np.isnan(expected)
        assert np.array_equal(ours[finite].view(np.uint32), expected[finite].view(np.uint32))  # -0.0 too


def test_every_e4m3_byte_is_read_into_pairs_of_bfloat16_exactly() -> None:
    stored = torch.arange(256).roll(3).to(torch.uint8)
    pairs = np.empty(123, np.uint32)  # seven whole vectors and a rest, from an odd byte on
    _read_pairs(stored.numpy(), 7, pairs)
    expected = stored[7:253].view(torch.float8_e4m3fn).bfloat16()
    ours = torch.from_numpy(pairs.view(np.uint16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


def test_numbers_round_to_the_nearest_e4m3() -> None:
    borders = [(low + high) / 2 for low, high in pairwise(E4M3)]
    values = [0.0, 1000.0, 464.0, *E4M3, *borders, *(torch.randn(200) * 50).tolist()]
    values += [-value for value in values]
    assert e4m3_bytes(torch.tensor(values)).tolist() == [nearest_byte(value) for value in values]


def test_scales_are_the_least_powers_of_two_that_suffice() -> None:
    needed = torch.cat([2.0 ** torch.arange(-20.0, 20.0), torch.rand(200) * 10 + 1e-6])
    needed = torch.cat([needed, needed.nextafter(torch.tensor(torch.inf)), needed.nextafter(torch.tensor(0.0))])
    scales = power_of_two_scales(needed)
    assert (scales >= needed).all()
    assert (scales / 2 < needed).all()
    assert (torch.frexp(scales).mantissa == 0.5).all()


HOSTILE = [0.0, -0.0, 1e-30, 1e-5, 448.0, 449.0, 1e4, -3.0, 0.1, 2.0**-9]


def test_an_fp8_latent_record_is_flash_mlas_byte_for_byte() -> None:
    """656 bytes: 512 numbers | 4 scales | 64 bfloat16; groups of zeros, of tiny, of large and of odd numbers."""
    latents, rope_keys = torch.randn(3, 512), torch.randn(3, 64)
    latents[0, :128] = 0.0
    latents[1, 128:256] *= 1e-6
    latents[1, :10] = torch.tensor(HOSTILE)
    latents[2, 256:384] *= 1e5
    latents[2, 0] = 448.0 * 4
    latents[2, 1:128] = 1.0
    pool = torch.full((2, 64, 656), 0xAB, dtype=torch.uint8)
    slots = torch.tensor([3, 64 + 5, 63])
    store_latents(latents, rope_keys, slots, pool)
    assert LatentLayout(512, 64).num_bytes == 656
    for token, slot in enumerate(slots.tolist()):
        record, values = bytes(pool.view(-1, 656)[slot].tolist()), latents[token].tolist()
        scales = [scale_for(values[start : start + 128], 448e-4) for start in range(0, 512, 128)]
        assert record[512:528] == struct.pack("<4f", *scales)
        assert record[:512] == bytes(nearest_byte(value / scales[i // 128]) for i, value in enumerate(values))
        assert record[528:] == bytes(rope_keys[token].bfloat16().view(torch.uint8).tolist())
        mantissas = {math.frexp(scale)[0] for scale in scales}
        assert mantissas == {0.5}, "powers of two"
    untouched = [slot for slot in range(128) if slot not in slots.tolist()]
    assert (pool.view(-1, 656)[untouched] == 0xAB).all()
    read, read_rope = read_latents(pool, slots, 512)
    expected = torch.tensor([[e4m3_value(byte) for byte in row[:512]] for row in pool.view(-1, 656)[slots].tolist()])
    stored_scales = pool.view(-1, 656)[slots, 512:528].contiguous().view(torch.float32).repeat_interleave(128, 1)
    assert torch.equal(read, expected * stored_scales)
    assert torch.equal(read_rope, rope_keys.bfloat16().float())


def test_an_fp8_index_page_is_deep_gemms_byte_for_byte() -> None:
    """8,448 bytes: 64 keys of 128 numbers, then their 64 scales."""
    keys = torch.randn(64, 128)
    keys[0] = 0.0
    keys[1] *= 1e-6
    keys[2, :10] = torch.tensor(HOSTILE)
    pool = torch.full((3, 8448), 0xAB, dtype=torch.uint8)
    order = torch.randperm(64)
    store_index_keys(keys[order], 64 + order, pool)
    assert (pool[[0, 2]] == 0xAB).all()
    page, expected_keys, expected_scales = bytes(pool[1].tolist()), b"", b""
    for values in keys.tolist():
        scale = scale_for(values, 1e-4)
        expected_keys += bytes(nearest_byte(value / scale) for value in values)
        expected_scales += struct.pack("<f", scale)
    assert page == expected_keys + expected_scales
    assert len(page) == 64 * 132
    key_pages, scale_pages = fp8_pages(pool, 128)
    assert bytes(key_pages[1, 5].tolist()) == page[5 * 128 : 6 * 128]
    assert float(scale_pages[1, 5]) == struct.unpack("<f", page[8192 + 20 : 8192 + 24])[0]
    by_hand = [
        [e4m3_value(byte) * float(scale_pages[1, t]) for byte in page[128 * t : 128 * t + 128]] for t in range(64)
    ]
    assert torch.equal(read_index_keys(pool, torch.arange(64, 128), 128), torch.tensor(by_hand))


def test_stores_refuse_what_does_not_fit() -> None:
    slots = torch.arange(2)
    with pytest.raises(ValueError, match="do not fit pool"):
        store_latents(torch.randn(2, 16), torch.randn(2, 8), slots, torch.zeros(1, 64, 23))
    with pytest.raises(ValueError, match="do not fit pool"):
        store_latents(torch.randn(2, 16), torch.randn(2, 8), slots, torch.zeros(1, 64, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="do not fit pool"):
        store_latents(torch.randn(3, 16), torch.randn(3, 8), slots, torch.zeros(1, 64, 24))
    with pytest.raises(ValueError, match="do not fit pool"):
        store_index_keys(torch.randn(2, 16), slots, torch.zeros(1, 64, 15))
    with pytest.raises(ValueError, match="a page of keys of 16 has 1280 bytes"):
        store_index_keys(torch.randn(2, 16), slots, torch.zeros(1, 64 * 16, dtype=torch.uint8))
