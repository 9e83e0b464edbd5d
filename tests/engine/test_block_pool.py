from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_engine.core.block_pool import BlockPool
from rempart_engine.core.integrity import IntegrityError


def test_fresh_blocks_come_in_order_and_are_counted() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 1
    assert [pool.ref_count(block_id) for block_id in range(4)] == [1, 1, 1, 0]


def test_blocks_without_worth_are_taken_before_cached_ones_and_those_least_recently_freed_first() -> None:
    pool = BlockPool(5)
    pool.allocate(5)
    for block_id, is_cached in ((3, True), (1, True), (0, False), (4, True), (2, False)):
        pool.free(block_id, is_cached=is_cached)
    assert pool.allocate(5) == [2, 0, 3, 1, 4]


def test_a_free_block_that_is_found_again_leaves_the_list() -> None:
    pool = BlockPool(3)
    pool.allocate(3)
    for block_id in (0, 1, 2):
        pool.free(block_id, is_cached=True)
    pool.ref(1)
    assert pool.num_free == 2
    assert pool.allocate(2) == [0, 2]


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    pool.ref(0)
    pool.free(0, is_cached=False)
    assert pool.num_free == 0
    pool.free(0, is_cached=False)
    assert pool.num_free == 1


def test_integrity_names_a_block_with_a_wrong_count() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    pool.check_integrity({0: 1, 1: 1})
    with pytest.raises(IntegrityError, match="block 1: 1 references, 2 holders"):
        pool.check_integrity({0: 1, 1: 2})


def test_freeing_a_free_block_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="block 0 is free already"):
        BlockPool(1).free(0, is_cached=False)


def test_taking_more_than_is_free_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="3 blocks asked of 2"):
        BlockPool(2).allocate(3)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "ref", "free"]), st.integers(0, 7), st.booleans())))
def test_any_use_keeps_counts_and_free_list_in_step_with_a_plain_model(uses: list[tuple[str, int, bool]]) -> None:
    pool = BlockPool(8)
    holders: Counter[int] = Counter()
    free = list(range(8))
    for use, number, is_cached in uses:
        if use == "allocate" and number <= len(free):
            taken, free = free[:number], free[number:]
            assert pool.allocate(number) == taken
            holders.update(taken)
        elif use == "ref":
            pool.ref(number)
            holders[number] += 1
            free = [block_id for block_id in free if block_id != number]
        elif use == "free" and holders[number]:
            pool.free(number, is_cached=is_cached)
            holders[number] -= 1
            if not holders[number]:
                free = [*free, number] if is_cached else [number, *free]
        pool.check_integrity(holders)
        assert pool.num_free == len(free)
