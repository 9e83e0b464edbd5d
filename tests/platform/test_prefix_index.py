import random

import pytest

from rempart_platform.endpoints.prefix_index import BLOCK_TOKENS, PrefixIndex, prefix_hashes

PLENTY = 10**6


def prompt(seed: int, num_blocks: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1000) for _ in range(num_blocks * BLOCK_TOKENS))


def hashes(seed: int, num_blocks: int, salt: bytes = b"acme") -> tuple[int, ...]:
    return prefix_hashes(salt, prompt(seed, num_blocks))


def test_only_whole_blocks_have_a_hash() -> None:
    token_ids = prompt(0, 3)
    assert prefix_hashes(b"s", ()) == prefix_hashes(b"s", token_ids[: BLOCK_TOKENS - 1]) == ()
    whole = prefix_hashes(b"s", token_ids)
    assert len(set(whole)) == 3
    assert prefix_hashes(b"s", (*token_ids, 5)) == whole
    assert prefix_hashes(b"s", token_ids[:-1]) == whole[:2]


@pytest.mark.parametrize("position", [0, BLOCK_TOKENS - 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS - 1])
def test_a_token_changes_the_hashes_of_all_prefixes_that_hold_it(position: int) -> None:
    token_ids = prompt(0, 3)
    other = (*token_ids[:position], 1000, *token_ids[position + 1 :])
    same = [ours == theirs for ours, theirs in zip(hashes(0, 3), prefix_hashes(b"acme", other), strict=True)]
    first = position // BLOCK_TOKENS
    assert same == [True] * first + [False] * (3 - first)


def test_the_order_of_blocks_matters() -> None:
    first, second = prompt(1, 1), prompt(2, 1)
    assert not set(prefix_hashes(b"s", first + second)) & set(prefix_hashes(b"s", second + first))


def test_salts_keep_tenants_apart() -> None:
    index = PrefixIndex(100)
    index.remember("a:1", hashes(0, 5), PLENTY)
    assert index.num_cached_blocks("a:1", hashes(0, 5)) == 5
    assert index.num_cached_blocks("a:1", hashes(0, 5, b"other")) == 0
    seen = [number for salt in range(50) for number in hashes(0, 5, b"tenant %d" % salt)]
    assert len(set(seen)) == len(seen)


def test_the_longest_common_prefix_is_found_at_the_endpoint_that_has_it() -> None:
    index = PrefixIndex(100)
    token_ids = prompt(0, 8)
    index.remember("a:1", prefix_hashes(b"s", token_ids), PLENTY)
    for num_common in range(9):
        fork = token_ids[: num_common * BLOCK_TOKENS] + prompt(7, 4)
        assert index.num_cached_blocks("a:1", prefix_hashes(b"s", fork)) == num_common
        assert index.num_cached_blocks("b:1", prefix_hashes(b"s", fork)) == 0


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    index = PrefixIndex(10)
    index.remember("a:1", hashes(1, 4), PLENTY)
    index.remember("a:1", hashes(2, 4), PLENTY)
    index.remember("a:1", hashes(1, 4), PLENTY)
    index.remember("a:1", hashes(3, 4), PLENTY)
    assert index.num_prefixes("a:1") == 10
    assert [index.num_cached_blocks("a:1", hashes(seed, 4)) for seed in (1, 2, 3)] == [4, 2, 4]
    for seed in range(4, 500):
        index.remember("a:1", hashes(seed, seed % 7), PLENTY)
        assert index.num_prefixes("a:1") <= 10


def test_of_a_prompt_beyond_the_bound_the_beginning_is_kept() -> None:
    index = PrefixIndex(10)
    index.remember("a:1", hashes(1, 40), PLENTY)
    assert index.num_cached_blocks("a:1", hashes(1, 40)) == index.num_prefixes("a:1") == 10


def test_no_more_is_remembered_than_the_endpoint_has_room_for() -> None:
    index = PrefixIndex(100)
    index.remember("a:1", hashes(1, 9), room=6)
    assert index.num_cached_blocks("a:1", hashes(1, 9)) == 6
    index.remember("a:1", hashes(2, 1), room=2)
    assert [index.num_cached_blocks("a:1", hashes(seed, 1)) for seed in (2, 1)] == [1, 1]
    assert index.num_prefixes("a:1") == 2


def test_where_one_prefix_is_gone_so_are_all_longer_ones() -> None:
    rng = random.Random(3)
    index, room = PrefixIndex(40), 40
    chains = [hashes(seed, 12) for seed in range(6)]
    # Chains that share their beginnings, as conversations do.
    trunk = prompt(9, 6)
    chains += [prefix_hashes(b"acme", trunk + prompt(seed, 6)) for seed in range(6)]
    for _ in range(2000):
        room = rng.choice((room, rng.randrange(1, 50)))
        index.remember("a:1", rng.choice(chains)[: rng.randrange(13)], room)
        for chain in chains:
            known = [index.num_cached_blocks("a:1", (number,)) == 1 for number in chain]
            assert known == sorted(known, reverse=True)
            assert index.num_cached_blocks("a:1", chain) == sum(known)


def test_a_lost_endpoint_is_forgotten_alone() -> None:
    index = PrefixIndex(10)
    for endpoint in ("a:1", "b:1"):
        index.remember(endpoint, hashes(1, 3), PLENTY)
    index.forget("a:1")
    index.forget("never:1")
    assert [index.num_cached_blocks(endpoint, hashes(1, 3)) for endpoint in ("a:1", "b:1")] == [0, 3]
    assert index.num_prefixes("a:1") == 0
