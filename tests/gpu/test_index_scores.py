"""Index scores, and the selection of tokens by them, against their meaning."""

from dataclasses import replace

import pytest
import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.index_cache import quantize_heads, read_index_keys, store_index_keys
from rempart_engine.kernels.select_tokens import Selection, select_tokens
from rempart_engine.kernels.select_tokens.kernel import select_on_gpu
from rempart_engine.kernels.select_tokens.kernel_queries import Queries, quantize_queries
from rempart_engine.kernels.select_tokens.kernel_scores import _keys_per_program, launch_scores
from rempart_engine.kernels.select_tokens.reference import select_tokens as reference_select
from rempart_engine.kernels.target import A100, B200, H100, Target, target_of
from rempart_engine.kernels.testing import make_step

NUM_BLOCKS = 12
MUCH = 1 << 20
"""Bytes for scores: enough for all tokens at once."""
KINDS = [
    pytest.param("float32", H100, id="float32"),
    pytest.param("bfloat16", H100, id="bfloat16"),
    pytest.param("fp8 of float32", H100, id="fp8 of float32"),
    pytest.param("fp8 of bfloat16", H100, id="fp8 of bfloat16"),
    pytest.param("fp8 of bfloat16", A100, id="fp8 of bfloat16, without fp8 instructions"),
]
STEPS = {
    "one decodes": [(130, 1)],
    "decode": [(130, 1), (3, 1), (64, 1), (65, 1)],
    "decode with drafts": [(130, 3), (66, 2)],
    "prefill": [(75, 75)],
    "prefill behind a prefix, beside decode": [(300, 17), (9, 9), (70, 1)],
}


def computing(kind: str) -> torch.dtype:
    return torch.float32 if kind.endswith("float32") else torch.bfloat16


def index_pool(kind: str, dim: int) -> torch.Tensor:
    if kind.startswith("fp8"):
        return torch.zeros(NUM_BLOCKS, 64 * (dim + 4), dtype=torch.uint8)
    return torch.zeros(NUM_BLOCKS, 64, dim, dtype=computing(kind))


def filled_pool(kind: str, keys: torch.Tensor) -> torch.Tensor:  # keys [N * 64, D]
    """On the CPU, as the references read it."""
    pool = index_pool(kind, keys.shape[1])
    if kind.startswith("fp8"):
        values, scales = quantize_heads(keys)
        pool[:, : -4 * 64] = values.view(NUM_BLOCKS, -1)
        pool[:, -4 * 64 :] = scales.view(NUM_BLOCKS, 64).view(torch.uint8)
    else:
        store_index_keys(keys, torch.arange(len(keys)), pool)
    return pool


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small ones, whose sums of products are exact in any order, and often equal."""
    return torch.randint(-2, 3, shape).float()


def moved(step: StepInputs, device: torch.device) -> StepInputs:
    tensors = {name: getattr(step, name) for name in StepInputs.__slots__ if name != "max_context"}
    return replace(step, **{name: tensor.to(device) for name, tensor in tensors.items()})


def on(device: torch.device, target: Target) -> Target:
    """The interpreter computes for any GPU, and every GPU what an A100 would; else it is the GPU that is there."""
    return target if device.type == "cpu" or target is A100 else target_of(torch.empty(0, device=device))


def choose(
    queries: torch.Tensor,
    weights: torch.Tensor,
    pool: torch.Tensor,
    step: StepInputs,
    top_k: int,
    device: torch.device,
    target: Target = H100,
    score_bytes: int = MUCH,
) -> Selection:
    """The selection, back on the CPU."""
    step = moved(step, device)
    inputs = (queries.to(device), weights.to(device), pool.to(device))
    selection = select_on_gpu(*inputs, step, top_k, score_bytes, on(device, target))
    return Selection(selection.positions.cpu(), selection.counts.cpu())


def assert_chosen(ours: Selection, expected: list[torch.Tensor], step: StepInputs, top_k: int) -> None:
    assert ours.positions.shape == (len(expected), top_k)
    for token, (position, places) in enumerate(zip(step.positions.tolist(), expected, strict=True)):
        count = int(ours.counts[token])
        assert count == min(position + 1, top_k)
        assert ours.positions[token, :count].tolist() == places.tolist()
        assert (ours.positions[token, count:] == -1).all()


@pytest.mark.parametrize(("kind", "target"), KINDS)
@pytest.mark.parametrize("name", STEPS)
def test_selection_equals_its_reference_with_many_ties(
    name: str, kind: str, target: Target, device: torch.device
) -> None:
    """Numbers are whole, so scores are exact and many are equal: of those the earliest win. Weights of both signs."""
    torch.manual_seed(0)
    step, heads, dim = make_step(STEPS[name], NUM_BLOCKS), 13, 16
    pool = filled_pool(kind, whole_numbers(64 * NUM_BLOCKS, dim))
    queries = whole_numbers(len(step.positions), heads, dim).to(computing(kind))
    weights = whole_numbers(len(step.positions), heads)
    ours = choose(queries, weights, pool, step, 50, device, target)
    assert_chosen(ours, reference_select(queries, weights, pool, step, 50), step, 50)


@pytest.mark.parametrize(("kind", "target"), KINDS)
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (15, 19), (33, 20)])
def test_selection_of_any_shape(heads: int, dim: int, kind: str, target: Target, device: torch.device) -> None:
    check_shape(heads, dim, kind, target, device)


@pytest.mark.parametrize(("kind", "target"), KINDS[1:])
def test_selection_at_the_shape_of_deepseek_v32(kind: str, target: Target, device: torch.device) -> None:
    """Not in float32: no tensor core multiplies it, and compiling such large products without takes long."""
    check_shape(64, 128, kind, target, device)


def check_shape(heads: int, dim: int, kind: str, target: Target, device: torch.device) -> None:
    torch.manual_seed(0)
    step = make_step([(140, 2), (70, 1)], NUM_BLOCKS)
    pool = filled_pool(kind, whole_numbers(64 * NUM_BLOCKS, dim))
    queries = whole_numbers(3, heads, dim).to(computing(kind))
    weights = whole_numbers(3, heads)
    ours = choose(queries, weights, pool, step, 8, device, target)
    assert_chosen(ours, reference_select(queries, weights, pool, step, 8), step, 8)


@pytest.mark.parametrize(("kind", "target"), KINDS)
@pytest.mark.parametrize("lengths", [[(130, 1), (66, 1)], [(150, 18), (66, 1)]], ids=["decode", "tiles"])
def test_scores_differ_from_exact_ones_by_rounding_alone(
    lengths: list[tuple[int, int]], kind: str, target: Target, device: torch.device
) -> None:
    torch.manual_seed(0)
    target = on(device, target)
    step, heads, dim = make_step(lengths, NUM_BLOCKS), 33, 32
    num_tokens = len(step.positions)
    pool = filled_pool(kind, torch.randn(64 * NUM_BLOCKS, dim))
    queries = torch.randn(num_tokens, heads, dim).to(computing(kind))
    weights = torch.randn(num_tokens, heads)
    on_device = moved(step, device)
    inputs = Queries(queries.to(device), weights.to(device))
    if kind.startswith("fp8"):
        inputs = quantize_queries(inputs.values, inputs.weights, on_device.positions, 0, target)
        values, scales = quantize_heads(queries)
        queries = values.view(torch.float8_e4m3fn).float() * scales[..., None]
    out = torch.full((num_tokens, 192), torch.nan, device=device)
    launch_scores(inputs, pool.to(device), on_device, 0, 0, target, out)
    for token, position in enumerate(step.positions.tolist()):
        table = step.block_tables[int(step.token_rows[token])].long()
        places = torch.arange(position + 1)
        keys = read_index_keys(pool, table[places // 64] * 64 + places % 64, dim).double()
        query, weight = queries[token].double(), weights[token].double()
        exact = (torch.relu(query @ keys.T) * weight[:, None]).sum(0)
        # Each of the D + Hi additions may be off by a unit of all terms together. Tensor cores cut where they do not
        # round; those of sm_90 keep but 13 bits behind the point of the largest term when they add products of e4m3.
        terms = ((query.abs() @ keys.abs().T) * weight.abs()[:, None]).sum(0)
        unit = 2.0**-24 if device.type == "cpu" else 2.0**-13 if kind.startswith("fp8") and target.has_fp8 else 2.0**-22
        assert ((out[token, : position + 1].cpu().double() - exact).abs() <= (dim + heads) * unit * terms).all()
        assert out[token, position + 1 :].isnan().all()


@pytest.mark.parametrize("target", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(3, 19), (64, 128)])
def test_queries_are_quantized_by_the_rule_of_keys(
    heads: int, dim: int, dtype: torch.dtype, target: Target, device: torch.device
) -> None:
    torch.manual_seed(0)
    queries = (torch.randn(4, heads, dim) * 2.0 ** torch.randint(-30, 30, (4, heads, 1))).to(dtype)
    queries[0, 0] = 0.0
    queries[1, 1, 0] = 448.0 * 2.0**5  # where a scale just is enough
    queries[1, 1, 1:] = 0.0
    weights = torch.randn(4, heads)
    values, scales = quantize_heads(queries)
    positions = torch.tensor([9, 5, 4, 8], dtype=torch.int32, device=device)
    ours = quantize_queries(queries.to(device), weights.to(device), positions, 5, target)
    needing = [0, 1, 3]
    if target.has_fp8:
        assert torch.equal(ours.values.cpu().view(torch.uint8)[needing], values[needing])
    else:
        assert torch.equal(ours.values.cpu().float()[needing], values.view(torch.float8_e4m3fn).float()[needing])
    assert torch.equal(ours.weights.cpu()[needing], (weights * scales)[needing])


@pytest.mark.parametrize("kind", ["bfloat16", "fp8 of bfloat16"])
def test_a_small_budget_for_scores_changes_nothing(kind: str, device: torch.device) -> None:
    """From one token at a time up to all; tiles are cut where the room ends."""
    torch.manual_seed(0)
    step = make_step([(150, 17), (9, 2), (100, 1)], NUM_BLOCKS)
    num_tokens, row = len(step.positions), 4 * 192
    pool = filled_pool(kind, whole_numbers(64 * NUM_BLOCKS, 16))
    queries, weights = whole_numbers(num_tokens, 5, 16).to(computing(kind)), whole_numbers(num_tokens, 5)
    expected = reference_select(queries, weights, pool, step, 16)
    for score_bytes in (1, row * 7, row * 18 + 1):
        ours = choose(queries, weights, pool, step, 16, device, score_bytes=score_bytes)
        assert_chosen(ours, expected, step, 16)


@pytest.mark.parametrize("kind", ["float32", "fp8 of bfloat16"])
def test_selection_sees_nothing_beyond_a_sequence(kind: str, device: torch.device) -> None:
    """Memory of nobody is full of NaN, and tables name blocks that do not exist beyond a sequence's."""
    torch.manual_seed(0)
    step, heads, dim = make_step([(70, 18), (130, 1)], NUM_BLOCKS), 5, 16
    pool = filled_pool(kind, whole_numbers(64 * NUM_BLOCKS, dim))
    queries, weights = whole_numbers(19, heads, dim).to(computing(kind)), whole_numbers(19, heads)
    expected = reference_select(queries, weights, pool, step, 8)
    is_used = torch.zeros(NUM_BLOCKS, 64, dtype=torch.bool)
    for row, length in ((0, 70), (1, 130)):
        places = torch.arange(length)
        is_used[step.block_tables[row].long()[places // 64], places % 64] = True
    if kind == "float32":
        pool[~is_used] = torch.nan
    else:
        pool[:, : 64 * dim].view(NUM_BLOCKS, 64, dim)[~is_used] = 0x7F
        pool[:, 64 * dim :].view(torch.float32)[~is_used] = torch.nan
    wide = torch.full((2, 9), 1 << 30, dtype=torch.int32)
    wide[0, :2], wide[1, :3] = step.block_tables[0, :2], step.block_tables[1, :3]
    step = replace(step, block_tables=wide[:, :3])
    assert_chosen(choose(queries, weights, pool, step, 8, device), expected, step, 8)


def test_padding_rows_and_empty_tiles_choose_themselves(device: torch.device) -> None:
    """As CUDA graphs have them: position 0 in a valid row, in a tile of one token or of none."""
    torch.manual_seed(0)
    step = make_step([(100, 1), (1, 1), (1, 1)], NUM_BLOCKS)
    step = replace(step, tile_sizes=torch.tensor([1, 1, 0], dtype=torch.int32))
    pool = filled_pool("bfloat16", whole_numbers(64 * NUM_BLOCKS, 16))
    queries, weights = whole_numbers(3, 5, 16).bfloat16(), whole_numbers(3, 5)
    ours = choose(queries, weights, pool, step, 8, device)
    assert_chosen(ours, reference_select(queries, weights, pool, step, 8), step, 8)


@pytest.mark.parametrize("lengths", [[(130, 4)], [(130, 1), (120, 1), (90, 1), (50, 1)]], ids=["tiles", "decode"])
def test_a_query_that_is_not_a_number_harms_no_other(lengths: list[tuple[int, int]], device: torch.device) -> None:
    """What it chooses itself is within its sequence, and top-k of it."""
    torch.manual_seed(0)
    step = make_step(lengths, NUM_BLOCKS)
    pool = filled_pool("float32", whole_numbers(64 * NUM_BLOCKS, 16))
    queries, weights = whole_numbers(4, 5, 16), whole_numbers(4, 5)
    expected = reference_select(queries, weights, pool, step, 8)
    queries[1], weights[2] = torch.nan, torch.nan
    ours = choose(queries, weights, pool, step, 8, device)
    for token in (0, 3):
        assert ours.positions[token].tolist() == expected[token].tolist()
    for token in (1, 2):
        places = ours.positions[token].tolist()
        assert places == sorted(set(places))
        assert places[0] >= 0
        assert places[-1] <= int(step.positions[token])


def test_short_contexts_need_no_positions(device: torch.device) -> None:
    step = moved(make_step([(8, 3)], NUM_BLOCKS), device)
    queries, pool = torch.randn(3, 2, 16, device=device), torch.zeros(1, 64, 16, device=device)
    ours = select_tokens(queries, torch.randn(3, 2, device=device), pool, step, 8, MUCH)
    assert ours.positions.shape == (3, 0)
    assert ours.positions.dtype == torch.int32
    assert ours.positions.device == ours.counts.device == queries.device
    assert ours.counts.tolist() == [6, 7, 8]


def test_tensors_may_be_views_but_the_pool(device: torch.device) -> None:
    torch.manual_seed(0)
    step = make_step([(70, 2)], NUM_BLOCKS)
    pool = filled_pool("float32", whole_numbers(64 * NUM_BLOCKS, 16))
    queries, weights = whole_numbers(2, 16, 5).transpose(1, 2), whole_numbers(2, 10)[:, ::2]
    ours = choose(queries, weights, pool, step, 8, device)
    assert_chosen(ours, reference_select(queries, weights, pool, step, 8), step, 8)
    with pytest.raises(ValueError, match=r"pool of index keys is not contiguous: \(2048, 16, 1\)"):
        choose(queries, weights, pool[::2], step, 8, device)


def test_selection_refuses_what_does_not_fit(device: torch.device) -> None:
    step = moved(make_step([(70, 1)], NUM_BLOCKS), device)
    queries, weights = torch.randn(1, 2, 16, device=device), torch.randn(1, 2, device=device)
    pool = torch.zeros(NUM_BLOCKS, 64, 16, device=device)
    with pytest.raises(ValueError, match=r"weights \(1, 1\) do not fit queries \(1, 2, 16\)"):
        select_tokens(queries, weights[:, :1], pool, step, 8, MUCH)
    with pytest.raises(ValueError, match=r"pool \(12, 64, 16\) of torch.bfloat16 does not fit"):
        select_tokens(queries, weights, pool.bfloat16(), step, 8, MUCH)


@pytest.mark.parametrize("target", [A100, H100, B200], ids=["A100", "H100", "B200"])
@pytest.mark.parametrize("max_context", [1, 128, 129, 32_768, 131_072, 163_840])
@pytest.mark.parametrize("num_tiles", [1, 7, 64, 256])
def test_programs_are_enough_to_be_busy_and_few_enough_to_fit(num_tiles: int, max_context: int, target: Target) -> None:
    keys = _keys_per_program(num_tiles, max_context, 128, target)
    assert keys % 128 == 0
    assert 128 <= keys <= 4096
    num_programs = num_tiles * -(-max_context // keys)
    if keys < 4096:
        assert num_programs <= 3 * target.num_multiprocessors + num_tiles
    if keys > 128:
        assert num_programs > target.num_multiprocessors


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "fp8 of bfloat16"])
def test_scores_have_the_same_bits_alone_and_in_company(kind: str, device: torch.device) -> None:
    """A token that decodes, and the same token in a tile of a prefill, and whoever is beside it."""
    torch.manual_seed(0)
    pool = filled_pool(kind, torch.randn(64 * NUM_BLOCKS, 128)).to(device)
    together = moved(make_step([(500, 20), (100, 1)], NUM_BLOCKS), device)
    alone = replace(moved(make_step([(500, 1)], NUM_BLOCKS), device), block_tables=together.block_tables[:1])
    target = on(device, H100)
    queries, weights = torch.randn(21, 64, 128, device=device).bfloat16(), torch.randn(21, 64, device=device)
    out = torch.zeros(2, 512, device=device)
    for row, step, first, tokens in ((0, together, 19, slice(None)), (1, alone, 0, slice(19, 20))):
        inputs = Queries(queries[tokens], weights[tokens])
        if kind.startswith("fp8"):
            inputs = quantize_queries(inputs.values, inputs.weights, step.positions, 0, target)
        launch_scores(inputs, pool, step, first, 0, target, out[row : row + 1])
    assert torch.equal(out[0], out[1])
    assert out[0, :500].any()
