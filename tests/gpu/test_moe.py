"""The mixture of experts on the GPU path, against its reference in float64."""

from dataclasses import dataclass

import pytest
import torch

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks, quantize_blocks
from rempart_engine.kernels.moe import GroupedExperts
from rempart_engine.kernels.moe.arrange import arrange, most_tiles
from rempart_engine.kernels.moe.kernel import Stack, cut, grouped_experts
from rempart_engine.kernels.moe.reference import (
    dequantize_int4,
    dequantize_int8,
    moe,
    quantize_int4,
    quantize_int8,
)
from rempart_engine.kernels.product_tiles import Numbers
from rempart_engine.kernels.target import A100, H100, Target
from rempart_engine.model.weights.weight import Weight

BLOCK = (128, 128)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Experts as a layer and as the matrices that it means, and tokens routed to them."""

    layer: GroupedExperts
    gate: torch.Tensor  # [E, F, W] float32
    up: torch.Tensor
    down: torch.Tensor  # [E, W, F]

    def stack(self) -> Stack:
        layer = self.layer
        return Stack(layer.numbers, layer.gate_up, layer.gate_up_scales, layer.down, layer.down_scales)


def meant(matrix: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """What is left of a matrix [R, C] in these numbers."""
    if numbers == "fp8":
        return dequantize_blocks(*quantize_blocks(matrix, BLOCK), BLOCK)
    if numbers == "int8":
        return dequantize_int8(*quantize_int8(matrix))
    if numbers == "int4":
        return dequantize_int4(*quantize_int4(matrix), matrix.shape[1])
    return matrix.bfloat16().float() if numbers == "bfloat16" else matrix


def make_case(num_experts: int, width: int, intermediate: int, numbers: Numbers, device: torch.device) -> Case:
    torch.manual_seed(num_experts + width)
    layer = GroupedExperts(num_experts, width, intermediate, numbers, device)
    kept: list[tuple[torch.Tensor, ...]] = []
    for expert in range(num_experts):
        matrices = (
            torch.randn(intermediate, width) / width**0.5,
            torch.randn(intermediate, width) / width**0.5,
            torch.randn(width, intermediate) / intermediate**0.5,
        )
        layer.write(expert, *(Weight(matrix) for matrix in matrices))
        kept.append(tuple(meant(matrix, numbers) for matrix in matrices))
    gate, up, down = (torch.stack(matrices) for matrices in zip(*kept, strict=True))
    return Case(layer, gate, up, down)


def route(num_tokens: int, num_experts: int, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts in ascending order; their popularity differs much, and some have no tokens."""
    popularity = torch.linspace(3, 0, num_experts) + torch.rand(num_tokens, num_experts)
    experts = popularity.topk(num_chosen).indices.sort(-1).values
    return experts, torch.rand(num_tokens, num_chosen) + 0.1


def assert_is_mixture(
    got: torch.Tensor,
    case: Case,
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    *,
    quantizes: bool,
) -> None:
    """Within float32's errors, and what follows where a number lies between two and falls to the other side.

    A result in bfloat16 moves by 2**-8 of itself then, and results are up to four times what they are like in size. A
    hidden state in e4m3 moves by 2**-3 of itself, but is one of 128 and more that are added.
    """
    want = moe(x.cpu(), experts, weights, case.gate, case.up, case.down, quantizes=quantizes)
    # Of a token: what its results are like in size.
    size = want.pow(2).mean(-1, keepdim=True).sqrt()
    tolerance = 2.0**-19 if x.dtype == torch.float32 else 2.0**-5 if quantizes else 2.0**-6
    assert got.dtype == torch.float32
    error = (got.cpu().double() - want).abs() / (want.abs() + size)
    assert error.max() <= tolerance


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("target", [A100, H100])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width", "intermediate", "num_chosen", "dtype"),
    [
        (5, 6, 37, 11, 3, torch.float32),
        (1, 2, 160, 140, 1, torch.float32),
        (7, 5, 256, 128, 2, torch.bfloat16),
        (40, 2, 300, 150, 2, torch.bfloat16),
    ],
)
def test_mixture_is_the_references(
    numbers: Numbers,
    target: Target,
    num_tokens: int,
    num_experts: int,
    width: int,
    intermediate: int,
    num_chosen: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = make_case(num_experts, width, intermediate, numbers, device)
    x = torch.randn(num_tokens, width).to(dtype)
    experts, weights = route(num_tokens, num_experts, num_chosen)
    got = grouped_experts(x.to(device), experts.to(device), weights.to(device), case.stack(), target)
    quantizes = numbers == "fp8" and target.has_fp8 and dtype == torch.bfloat16
    assert_is_mixture(got, case, x, experts, weights, quantizes=quantizes)


@pytest.mark.parametrize(("numbers", "target"), [("fp8", H100), ("int8", A100), ("bfloat16", A100)])
def test_a_row_has_the_same_bits_in_any_company(numbers: Numbers, target: Target, device: torch.device) -> None:
    """In tiles of every size."""
    case = make_case(2, 130, 129, numbers, device)
    x = torch.randn(130, 130).bfloat16().to(device)
    experts, weights = (part.to(device) for part in route(130, 2, 2))
    sizes = [cut(target, numbers, 2, 2 * count, 2).down.tokens for count in (3, 130)]
    assert sizes[0] < sizes[1]
    whole = grouped_experts(x, experts, weights, case.stack(), target)
    few = grouped_experts(x[:3], experts[:3], weights[:3], case.stack(), target)
    assert torch.equal(few, whole[:3])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen", "tile"),
    [(1, 5, 1, 16), (9, 20, 8, 16), (700, 3, 2, 16), (130, 7, 3, 128)],
)
def test_assignments_are_sorted_and_tiles_meet_one_expert(
    num_tokens: int, num_experts: int, num_chosen: int, tile: int, device: torch.device
) -> None:
    torch.manual_seed(num_tokens)
    experts, _ = route(num_tokens, num_experts, num_chosen)
    found = arrange(experts.to(device), num_experts, tile)
    order = experts.flatten().argsort(stable=True)
    assert torch.equal(found.order.cpu().long(), order)
    assert torch.equal(found.rows.cpu().long()[order], torch.arange(len(order)))
    tiles: list[tuple[int, int, int]] = []
    start = 0
    for expert, size in enumerate(experts.flatten().bincount(minlength=num_experts).tolist()):
        tiles += [(expert, row, start + size) for row in range(start, start + size, tile)]
        start += size
    got = torch.stack((found.tile_experts, found.tile_starts, found.tile_ends), 1).cpu()
    assert [tuple(row) for row in got.tolist() if row[0] >= 0] == tiles
    assert got[len(tiles) :, 0].eq(-1).all()
    assert len(got) == most_tiles(len(order), num_experts, tile)


@pytest.mark.parametrize("tile", [16, 128])
def test_tiles_suffice_for_the_worst_distribution(tile: int) -> None:
    """All experts but one have one assignment, or one more than whole tiles."""
    for num_experts in (1, 3, 256):
        for num_assignments in (1, 5, 255, 256, 257, 4096, 5000):
            singles = min(num_experts - 1, num_assignments - 1)
            needed = singles + -(-(num_assignments - singles) // tile)
            assert needed <= most_tiles(num_assignments, num_experts, tile) <= num_assignments


def test_duplicate_experts_count_twice(device: torch.device) -> None:
    case = make_case(3, 40, 20, "float32", device)
    x = torch.randn(2, 40)
    experts, weights = torch.tensor([[1, 1], [0, 2]]), torch.tensor([[0.25, 0.5], [1.0, 2.0]])
    got = case.layer(x.to(device), experts.to(device), weights.to(device))
    assert_is_mixture(got, case, x, experts, weights, quantizes=False)


def test_a_token_that_is_no_number_spoils_no_other(device: torch.device) -> None:
    case = make_case(3, 140, 130, "fp8", device)
    x = torch.randn(6, 140, device=device).bfloat16()
    experts, weights = (part.to(device) for part in route(6, 3, 2))
    clean = case.layer(x, experts, weights)
    x[4, 3] = torch.nan
    spoiled = case.layer(x, experts, weights)
    assert spoiled[4].isnan().all()
    others = [0, 1, 2, 3, 5]
    assert torch.equal(spoiled[others], clean[others])


def test_experts_nobody_took_are_not_read(device: torch.device) -> None:
    case = make_case(4, 40, 20, "float32", device)
    case.layer.gate_up[3] = torch.nan
    case.layer.down[3] = torch.nan
    x, weights = torch.randn(5, 40), torch.ones(5, 2)
    experts = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 2], [0, 1]])
    got = case.layer(x.to(device), experts.to(device), weights.to(device))
    assert_is_mixture(got, case, x, experts, weights, quantizes=False)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", ["bfloat16", "fp8", "int8", "int4"])
def test_a_graph_replays_other_tokens(numbers: Numbers, device: torch.device) -> None:
    """Nothing that is launched depends on where tokens go."""
    case = make_case(8, 256, 128, numbers, device)
    x = torch.randn(5, 256, device=device).bfloat16()
    experts, weights = (part.to(device) for part in route(5, 8, 2))
    case.layer(x, experts, weights)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.layer(x, experts, weights)
    x.copy_(torch.randn(5, 256).bfloat16())
    experts.copy_(7 - experts.flip(1))
    graph.replay()
    assert torch.equal(replayed, case.layer(x, experts, weights))


def test_rows_may_lie_apart_and_none_is_no_work(device: torch.device) -> None:
    case = make_case(3, 40, 20, "bfloat16", device)
    wide = torch.randn(5, 90, device=device).bfloat16()
    experts, weights = (part.to(device) for part in route(5, 3, 2))
    apart = wide[:, 7:47]
    assert torch.equal(case.layer(apart, experts, weights), case.layer(apart.contiguous(), experts, weights))
    assert case.layer(apart[:0], experts[:0], weights[:0]).shape == (0, 40)


def test_fp8_of_a_checkpoint_keeps_its_bits_or_becomes_other_numbers(device: torch.device) -> None:
    data, scales = quantize_blocks(torch.randn(130, 140), BLOCK)
    down_data, down_scales = quantize_blocks(torch.randn(140, 130), BLOCK)
    weight, down = Weight(data, scales, BLOCK), Weight(down_data, down_scales, BLOCK)
    kept = GroupedExperts(2, 140, 130, "fp8", device)
    kept.write(1, weight, weight, down)
    assert torch.equal(kept.gate_up[1, 0].view(torch.uint8).cpu(), data.view(torch.uint8))
    assert kept.gate_up_scales is not None
    assert torch.equal(kept.gate_up_scales[1, 1].cpu(), scales)
    decoded = GroupedExperts(1, 140, 130, "bfloat16", device)
    decoded.write(0, weight, weight, down)
    assert torch.equal(decoded.down[0].cpu(), dequantize_blocks(down_data, down_scales, BLOCK).bfloat16())


@pytest.mark.parametrize(("numbers", "largest"), [("int8", 127), ("int4", 7)])
def test_integers_are_off_by_half_a_step(numbers: Numbers, largest: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 300) * torch.tensor([1.0, 1e-6, 1e6, 0.0, 1.0])[:, None]
    groups = torch.nn.functional.pad(weight, (0, 84)).view(5, 3, 128)
    steps = (groups.abs().amax(-1) / largest).repeat_interleave(128, 1)[:, :300]
    error = (meant(weight, numbers) - weight).abs()
    assert (error <= steps * 0.5001).all()
    assert (error[0] > steps[0] * 0.25).any()


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    layer = GroupedExperts(3, 40, 20, "fp8", device)
    up, down = Weight(torch.zeros(20, 40)), Weight(torch.zeros(40, 20))
    with pytest.raises(ValueError, match=r"down is \(40, 20\)"):
        layer.write(0, up, up, up)
    with pytest.raises(IndexError, match="3 of 3"):
        layer.write(3, up, up, down)
    data, scales = quantize_blocks(torch.zeros(20, 40), (16, 16))
    with pytest.raises(ValueError, match=r"blocks of \(128, 128\)"):
        layer.write(0, Weight(data, scales, (16, 16)), up, down)
    x = torch.zeros(2, 40, device=device)
    ids, weights = torch.zeros(2, 1, dtype=torch.int64, device=device), torch.ones(2, 1, device=device)
    with pytest.raises(ValueError, match="float16"):
        layer(x.half(), ids, weights)
    with pytest.raises(ValueError, match="int32"):
        layer(x, ids.int(), weights)
    with pytest.raises(ValueError, match="do not fit"):
        layer(x, ids, weights[:1])
    with pytest.raises(ValueError, match="side by side"):
        layer(torch.zeros(40, 2, device=device).T, ids, weights)
