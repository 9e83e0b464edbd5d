"""Tokens brought together by expert, in tiles of which each meets one expert's weights. Nothing waits for the GPU."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rempart_engine.kernels.builds import Build

BLOCK = 1024
"""Assignments that are looked at together."""
NUM_WARPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Assignments, which are pairs of a token and one of its experts, sorted by expert and then by token.

    Rows are places in that order. A tile is a range of rows of one expert.
    """

    order: torch.Tensor  # [A] int32, by row: the assignment token * k + place
    rows: torch.Tensor  # [A] int32, by assignment
    tile_experts: torch.Tensor  # [N] int32; -1: no tile
    tile_starts: torch.Tensor  # [N] int32: first row
    tile_ends: torch.Tensor  # [N] int32: end of the expert's rows


@triton.jit
def count(experts, counts, num_assignments, BLOCK: tl.constexpr):
    """How many assignments an expert has."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_assignments, BLOCK):
        place = start + tl.arange(0, BLOCK)
        found += (tl.load(experts + place, mask=place < num_assignments, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit
def arrange_expert(
    experts,  # [A] int64
    counts,  # [E]
    order,
    rows,
    tile_experts,
    tile_starts,
    tile_ends,
    num_assignments,
    num_experts,
    num_tiles,
    TILE: tl.constexpr,  # rows of a tile
    EXPERTS: tl.constexpr,  # a power of two, at least E
    BLOCK: tl.constexpr,
):
    """Rows and tiles of one expert; the last one marks the tiles that nobody has."""
    expert = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    all_counts = tl.load(counts + ids, mask=ids < num_experts, other=0)
    all_tiles = tl.cdiv(all_counts, TILE)
    is_before = ids < expert
    row = tl.sum(tl.where(is_before, all_counts, 0), 0)
    tile = tl.sum(tl.where(is_before, all_tiles, 0), 0)
    end = row + tl.sum(tl.where(ids == expert, all_counts, 0), 0)
    end_tile = tile + tl.cdiv(end - row, TILE)
    last_tile = tl.where(expert == num_experts - 1, num_tiles, end_tile)
    for start in range(tile, last_tile, BLOCK):
        place = start + tl.arange(0, BLOCK)
        is_mine = place < last_tile
        tl.store(tile_experts + place, tl.where(place < end_tile, expert, -1), mask=is_mine)
        tl.store(tile_starts + place, row + (place - tile) * TILE, mask=is_mine)
        tl.store(tile_ends + place, end + 0 * place, mask=is_mine)
    for start in range(0, num_assignments, BLOCK):
        place = start + tl.arange(0, BLOCK)
        is_mine = tl.load(experts + place, mask=place < num_assignments, other=-1) == expert
        mine = is_mine.to(tl.int32)
        my_rows = row + tl.cumsum(mine, 0) - mine
        tl.store(order + my_rows, place, mask=is_mine)
        tl.store(rows + place, my_rows, mask=is_mine)
        row += tl.sum(mine, 0)


def most_tiles(num_assignments: int, num_experts: int, tile: int) -> int:
    """That experts can have between them: whole ones, and a partial one for each expert."""
    return min(num_assignments, num_assignments // tile + num_experts)


def arrange(experts: torch.Tensor, num_experts: int, tile: int) -> Arrangement:
    """Ids [T, k], each in [0, num_experts), in tiles of `tile` rows."""
    num_assignments = experts.numel()
    num_tiles = most_tiles(num_assignments, num_experts, tile)

    def integers(size: int) -> torch.Tensor:
        return experts.new_empty(size, dtype=torch.int32)

    found = Arrangement(
        integers(num_assignments),
        integers(num_assignments),
        integers(num_tiles),
        integers(num_tiles),
        integers(num_tiles),
    )
    counts = integers(num_experts)
    count[(num_experts,)](experts, counts, num_assignments, BLOCK=BLOCK, num_warps=NUM_WARPS)
    arrange_expert[(num_experts,)](
        experts,
        counts,
        found.order,
        found.rows,
        found.tile_experts,
        found.tile_starts,
        found.tile_ends,
        num_assignments,
        num_experts,
        num_tiles,
        TILE=tile,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return found


def builds(num_experts: int, tiles: tuple[int, ...]) -> Iterator[Build]:
    """For tiles of so many rows."""
    yield Build(
        name="count",
        kernel=count,
        arguments={"experts": "*i64", "counts": "*i32", "num_assignments": "i32"},
        constants={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        num_stages=3,
    )
    for tile in tiles:
        yield Build(
            name=f"arrange, tiles of {tile}",
            kernel=arrange_expert,
            arguments={"experts": "*i64", "counts": "*i32", "order": "*i32", "rows": "*i32"}
            | {"tile_experts": "*i32", "tile_starts": "*i32", "tile_ends": "*i32"}
            | {"num_assignments": "i32", "num_experts": "i32", "num_tiles": "i32"},
            constants={"TILE": tile, "EXPERTS": triton.next_power_of_2(num_experts), "BLOCK": BLOCK},
            num_warps=NUM_WARPS,
            num_stages=3,
        )
