"""What a DeepSeek layer caches of a token, on the GPU path: every byte of the pools against the reference's."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from rempart_engine.kernels.index_cache import fp8_pages, read_index_keys, store_index_keys
from rempart_engine.kernels.latent_cache import LatentLayout, read_latents
from rempart_engine.kernels.rope import Angles, RopeLayout
from rempart_engine.kernels.rope.reference import rotate
from rempart_engine.kernels.store_latent_kv import IndexKeys, store_latent_kv
from rempart_engine.kernels.store_latent_kv.reference import store_latent_kv as reference

NUM_BLOCKS = 3
SLOTS = torch.tensor([130, 0, -1, 63, 64, -1, 191])
KEPT = SLOTS[SLOTS >= 0]
LAYOUTS: list[RopeLayout] = ["half-split", "interleaved"]
CACHES = [torch.float32, torch.bfloat16, torch.uint8]
# Latent, rotary key and index key. An fp8 record wants a latent of a multiple of 4.
V32, ODD, SMALL = (512, 64, 128), (132, 6, 20), (37, 6, 19)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def filled_pools(cache: torch.dtype, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Of all ones: bytes that no test stores, NaN as a float."""
    latent_dim, rope_dim, key_dim = shape
    if cache == torch.uint8:
        record = LatentLayout(latent_dim, rope_dim).num_bytes
        shapes = [(NUM_BLOCKS, 64, record), (NUM_BLOCKS, 64 * (key_dim + 4))]
    else:
        shapes = [(NUM_BLOCKS, 64, latent_dim + rope_dim), (NUM_BLOCKS, 64, key_dim)]
    return [torch.full((*each, cache.itemsize), 255, dtype=torch.uint8).view(cache)[..., 0] for each in shapes]


def as_bytes(pool: torch.Tensor) -> torch.Tensor:
    return pool.cpu().contiguous().view(torch.uint8)


def store(
    device: torch.device,
    pools: list[torch.Tensor],
    latents_and_rope: torch.Tensor,
    kv_norm: torch.Tensor,
    angles: Angles,
    keys: IndexKeys,
    eps: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The pools as the GPU path leaves them, on the CPU, and as the reference does."""
    ours, expected = [pool.to(device, copy=True) for pool in pools], [pool.clone() for pool in pools]
    there = replace(
        keys,
        raw=keys.raw.to(device),
        norm_weight=keys.norm_weight.to(device),
        norm_bias=keys.norm_bias.to(device),
    )
    angles_there = angles[0].to(device), angles[1].to(device)
    store_latent_kv(
        latents_and_rope.to(device), kv_norm.to(device), eps, angles_there, SLOTS.to(device), ours[0], there, ours[1]
    )
    reference(latents_and_rope, kv_norm, eps, angles, SLOTS, expected[0], keys, expected[1])
    return [pool.cpu() for pool in ours], expected


def signs(num_tokens: int, width: int) -> torch.Tensor:
    """-1 as often as 1 in each row: mean 0, mean square 1, so that both norms are exact whatever the order of sums."""
    return torch.stack([torch.ones(width).index_fill_(0, torch.randperm(width)[::2], -1.0) for _ in range(num_tokens)])


def right_angles(num_tokens: int, rope_dim: int) -> Angles:
    """Multiples of 90 degrees: the rotation is exact, fused or not."""
    quarters = torch.randint(0, 4, (num_tokens, rope_dim // 2))
    return torch.tensor([1.0, 0.0, -1.0, 0.0])[quarters], torch.tensor([0.0, 1.0, 0.0, -1.0])[quarters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [V32, ODD])
def test_every_byte_is_the_references_where_norms_and_turns_are_exact(
    device: torch.device, dtype: torch.dtype, cache: torch.dtype, layout: RopeLayout, shape: tuple[int, int, int]
) -> None:
    """Norm weights make all sorts of numbers of the signs, also so small that scales reach their least."""
    latent_dim, rope_dim, key_dim = shape
    latents = torch.cat((signs(len(SLOTS), latent_dim), torch.randn(len(SLOTS), rope_dim)), 1).to(dtype)
    angles = right_angles(len(SLOTS), rope_dim)
    for size in (2.0**-20, 1.0, 2.0**20):
        weight, bias, kv_norm = torch.randn(key_dim) * size, torch.randn(key_dim) * size, torch.randn(latent_dim) * size
        keys = IndexKeys(signs(len(SLOTS), key_dim).to(dtype), weight, bias, 0.0, layout)
        ours, expected = store(device, filled_pools(cache, shape), latents, kv_norm, angles, keys, 0.0)
        # torch's layer norm keeps a running mean, which is inexact on the way.
        turned = rotate((keys.raw.float() * weight + bias)[:, None], *angles, is_interleaved=layout == "interleaved")
        store_index_keys(turned[SLOTS >= 0, 0], KEPT, expected[1])
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(as_bytes(mine), as_bytes(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cache", "shape"), [*product(CACHES, (V32, ODD)), *product(CACHES[:2], (SMALL,))])
def test_records_and_keys_are_near_the_references(
    device: torch.device, dtype: torch.dtype, cache: torch.dtype, layout: RopeLayout, shape: tuple[int, int, int]
) -> None:
    """Another order of sums moves a float32 by its last bits, and by that a rounding to one step further at most."""
    latent_dim, rope_dim, key_dim = shape
    angles = torch.rand(len(SLOTS), rope_dim // 2) * 6
    keys = IndexKeys(
        raw=torch.randn(len(SLOTS), key_dim).to(dtype) * 3 + 1,
        norm_weight=torch.rand(key_dim) + 0.5,
        norm_bias=torch.randn(key_dim),
        eps=1e-6,
        layout=layout,
    )
    latents = torch.randn(len(SLOTS), 2 * (latent_dim + rope_dim)).to(dtype)[:, 3 : 3 + latent_dim + rope_dim]
    pools = filled_pools(cache, shape)
    kv_norm = torch.rand(latent_dim) + 0.5
    ours, expected = store(device, pools, latents, kv_norm, (angles.cos(), angles.sin()), keys, 1e-6)

    float_step = max(torch.finfo(dtype).eps, torch.finfo(torch.bfloat16 if cache == torch.uint8 else cache).eps)
    code_step = 2.0**-3 if cache == torch.uint8 else float_step
    least = 1e-4 if cache == torch.uint8 else 1e-5  # the least step of e4m3 beside a number near 8: 2**-9 * 2**-5
    mine, theirs = read_latents(ours[0], KEPT, latent_dim), read_latents(expected[0], KEPT, latent_dim)
    for our_part, part, step in zip(mine, theirs, (code_step, float_step), strict=True):
        assert ((our_part - part).abs() <= step * part.abs() + least).all()
        assert cache == torch.float32 or (our_part == part).float().mean() > 0.95
    our_keys, their_keys = read_index_keys(ours[1], KEPT, key_dim), read_index_keys(expected[1], KEPT, key_dim)
    key_step = code_step if cache != torch.float32 else torch.finfo(torch.float32).eps
    assert ((our_keys - their_keys).abs() <= key_step * their_keys.abs() + least).all()
    if cache == torch.uint8:
        at = KEPT // 64, KEPT % 64
        assert torch.equal(fp8_pages(ours[1], key_dim)[1][at], fp8_pages(expected[1], key_dim)[1][at])


@pytest.mark.parametrize("cache", CACHES)
def test_nothing_is_written_but_what_the_slots_name(device: torch.device, cache: torch.dtype) -> None:
    keys = IndexKeys(torch.randn(7, 20), torch.rand(20), torch.rand(20), 1e-6, "half-split")
    pools = filled_pools(cache, ODD)
    ours, _ = store(device, pools, torch.randn(7, 138), torch.rand(132), right_angles(7, 6), keys, 1e-6)
    others = torch.ones(64 * NUM_BLOCKS, dtype=torch.bool)
    others[KEPT] = False
    assert (as_bytes(ours[0].view(64 * NUM_BLOCKS, -1)[others]) == 255).all()
    if cache == torch.uint8:
        for pages in fp8_pages(ours[1], 20):
            assert (as_bytes(pages.flatten(0, 1)[others]) == 255).all()
    else:
        assert (as_bytes(ours[1].view(64 * NUM_BLOCKS, -1)[others]) == 255).all()


def test_a_layer_without_an_indexer_stores_latents_alone(device: torch.device) -> None:
    pool = filled_pools(torch.uint8, ODD)[0]
    expected = pool.clone()
    ours = pool.to(device)
    x, norm, angles = torch.cat((signs(7, 132), torch.randn(7, 6)), 1), torch.randn(132), right_angles(7, 6)
    there = angles[0].to(device), angles[1].to(device)
    store_latent_kv(x.to(device), norm.to(device), 0.0, there, SLOTS.to(device), ours, None, None)
    reference(x, norm, 0.0, angles, SLOTS, expected, None, None)
    assert torch.equal(ours.cpu(), expected)


def test_offsets_beyond_32_bits_are_reached(device: torch.device) -> None:
    """A CPU gives no memory to what is never written of the large pools."""
    shape, block_bytes = (128, 2, 132), 64 * 136
    weight = torch.rand(132).to(device)
    keys = IndexKeys(signs(1, 132).to(device), weight, weight, 0.0, "half-split")
    x, norm = torch.cat((signs(1, 128), torch.randn(1, 2)), 1).to(device), torch.rand(128).to(device)
    angles = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    stored = []
    for num_blocks in (1, 2**31 // block_bytes + 2):
        pools = [
            torch.empty(num_blocks, *pool.shape[1:], dtype=torch.uint8, device=device)
            for pool in filled_pools(torch.uint8, shape)
        ]
        slots = torch.tensor([64 * num_blocks - 1], device=device)
        store_latent_kv(x, norm, 0.0, angles, slots, pools[0], keys, pools[1])
        stored.append([*read_latents(pools[0], slots, 128), read_index_keys(pools[1], slots, 132)])
    for near, far in zip(*stored, strict=True):
        assert torch.equal(near, far)
        assert near.any()


@pytest.mark.parametrize("cache", CACHES)
def test_nans_stay_nans_and_in_their_record(device: torch.device, cache: torch.dtype) -> None:
    keys = IndexKeys(torch.randn(7, 20), torch.rand(20), torch.rand(20), 1e-6, "interleaved")
    x = torch.randn(7, 138)
    x[1, 5], keys.raw[1, 19] = torch.nan, torch.nan
    ours, _ = store(device, filled_pools(cache, ODD), x, torch.rand(132), right_angles(7, 6), keys, 1e-6)
    latents, rope_keys = read_latents(ours[0], KEPT, 132)
    index_keys = read_index_keys(ours[1], KEPT, 20)
    assert not rope_keys.isnan().any()
    for part in (latents, index_keys):
        assert part.isnan().all(1).tolist() == [False, True, False, False, False]
        assert part.isnan().any(1).tolist() == [False, True, False, False, False]


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    latent_pool, index_pool = (pool.to(device) for pool in filled_pools(torch.uint8, ODD))
    x, norm = torch.randn(7, 138, device=device), torch.rand(132, device=device)
    angles, slots = (torch.ones(7, 3, device=device), torch.zeros(7, 3, device=device)), SLOTS.to(device)
    weight = torch.rand(20, device=device)
    keys = IndexKeys(torch.randn(7, 20, device=device), weight, weight, 1e-6, "half-split")
    with pytest.raises(ValueError, match="come together"):
        store_latent_kv(x, norm, 1e-6, angles, slots, latent_pool, keys, None)
    with pytest.raises(ValueError, match="is not a latent of"):
        store_latent_kv(x[:, :-1], norm, 1e-6, angles, slots, latent_pool, None, None)
    with pytest.raises(ValueError, match="int64 slot"):
        store_latent_kv(x, norm, 1e-6, angles, slots.int(), latent_pool, None, None)
    with pytest.raises(ValueError, match="do not fit pool"):
        store_latent_kv(x, norm, 1e-6, angles, slots, latent_pool[..., :-4], None, None)
    with pytest.raises(ValueError, match="float32"):
        store_latent_kv(x, norm.bfloat16(), 1e-6, angles, slots, latent_pool, None, None)
    with pytest.raises(ValueError, match="are not of"):
        store_latent_kv(x, norm, 1e-6, angles, slots, latent_pool, replace(keys, raw=keys.raw[:3]), index_pool)
    with pytest.raises(ValueError, match="a page of keys"):
        store_latent_kv(x, norm, 1e-6, angles, slots, latent_pool, keys, index_pool[:, :-4].contiguous())
    with pytest.raises(ValueError, match="float32"):
        store_latent_kv(x, norm, 1e-6, angles, slots, latent_pool, replace(keys, norm_bias=weight[:3]), index_pool)
