"""What a DeepSeek layer caches of a token, on a CPU: the pools' every byte against the reference's."""

import pytest
import torch

from rempart_engine.kernels.latent_cache import LatentLayout
from rempart_engine.kernels.rope import RopeLayout, rotate, rotate_in_place
from rempart_engine.kernels.store_latent_kv import IndexKeys, store_latent_kv
from rempart_engine.kernels.store_latent_kv.reference import store_latent_kv as reference

SLOTS = torch.tensor([130, 0, 63, 64, 191])
LAYOUTS: list[RopeLayout] = ["half-split", "interleaved"]
LATENT_DIM, ROPE_DIM, KEY_DIM = 132, 6, 20


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def signs(width: int) -> torch.Tensor:
    """Of mean square 1, so that the norm is exact whatever the order of sums."""
    return torch.randint(0, 2, (len(SLOTS), width)) * 2.0 - 1.0


def empty_pools(cache: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if cache == torch.uint8:
        record = LatentLayout(LATENT_DIM, ROPE_DIM).num_bytes
        return torch.zeros(3, 64, record, dtype=cache), torch.zeros(3, 64 * (KEY_DIM + 4), dtype=cache)
    return torch.zeros(3, 64, LATENT_DIM + ROPE_DIM, dtype=cache), torch.zeros(3, 64, KEY_DIM, dtype=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pools_hold_what_the_reference_stores(dtype: torch.dtype, cache: torch.dtype, layout: RopeLayout) -> None:
    angles = torch.rand(len(SLOTS), ROPE_DIM // 2) * 6
    x = torch.cat((signs(LATENT_DIM), torch.randn(len(SLOTS), ROPE_DIM)), 1).to(dtype)
    keys = IndexKeys(
        torch.randn(len(SLOTS), KEY_DIM).to(dtype), torch.rand(KEY_DIM), torch.randn(KEY_DIM), 1e-6, layout
    )
    ours, expected = empty_pools(cache), empty_pools(cache)
    arguments = x, torch.randn(LATENT_DIM), 0.0, (angles.cos(), angles.sin()), SLOTS
    store_latent_kv(*arguments, ours[0], keys, ours[1])
    reference(*arguments, expected[0], keys, expected[1])
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.any()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_in_place_has_the_bits_of_the_other(layout: RopeLayout) -> None:
    x, angles = torch.randn(5, 3, 16).bfloat16(), torch.rand(5, 4) * 6
    table = angles.cos(), angles.sin()
    expected = torch.cat((x[..., :5], rotate(x[..., 5:], table, layout)), -1)
    rotate_in_place(x[..., 5:], table, layout)
    assert torch.equal(x, expected)
