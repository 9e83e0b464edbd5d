from hashlib import sha256

import pytest

from rempart_engine.core.block_tables import BlockTables
from rempart_engine.core.integrity import IntegrityError
from rempart_engine.core.prefix_cache import PrefixCache, block_digest, root_digest
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.sequence import Sequence
from rempart_engine.core.testing import make_request


def make_sequence(
    token_ids: list[int], cache_salt: bytes = b"", sampling: SamplingParams | None = None, choice: int = 0
) -> Sequence:
    return Sequence(make_request("r", token_ids, cache_salt=cache_salt, sampling=sampling), choice, 0, frozenset(), 100)


def make_tables(num_blocks: int = 8, *, enable_prefix_cache: bool = True) -> BlockTables:
    return BlockTables(num_blocks, block_size=4, enable_prefix_cache=enable_prefix_cache)


def compute(tables: BlockTables, sequence: Sequence, num_tokens: int) -> None:
    """Admit, and commit so many tokens."""
    tables.admit(sequence, tables.match(sequence))
    sequence.num_computed_tokens = num_tokens
    tables.publish(sequence)


def test_the_chain_is_sha256_over_parent_and_little_endian_token_ids_and_starts_from_the_salt() -> None:
    root = root_digest(b"salt")
    assert root == sha256(b"salt").digest()
    assert block_digest(root, [1, 256]) == sha256(root + bytes([1, 0, 0, 0, 0, 1, 0, 0])).digest()


def test_the_longest_run_from_the_first_block_matches() -> None:
    cache = PrefixCache()
    digests = [bytes([number]) for number in range(4)]
    for number in (0, 1, 3):
        cache.insert(digests[number], number + 10)
    assert cache.match(digests) == [10, 11]
    assert cache.match(digests[1:2]) == [11]
    assert cache.match([b"other"]) == []


def test_the_first_block_with_a_content_stays_and_a_second_is_not_cached() -> None:
    cache = PrefixCache()
    cache.insert(b"d", 1)
    cache.insert(b"d", 2)
    assert cache.match([b"d"]) == [1]
    assert 1 in cache
    assert 2 not in cache


def test_an_evicted_block_is_not_found() -> None:
    cache = PrefixCache()
    cache.insert(b"d", 1)
    cache.evict(1)
    cache.evict(1)
    assert cache.match([b"d"]) == []
    assert len(cache) == 0
    cache.check_integrity()


def test_integrity_sees_when_the_two_directions_differ() -> None:
    cache = PrefixCache()
    cache.insert(b"d", 1)
    del cache._digests[1]
    with pytest.raises(IntegrityError):
        cache.check_integrity()


def test_blocks_are_found_only_once_their_tokens_are_computed() -> None:
    tables = make_tables()
    first, second = make_sequence(list(range(1, 11))), make_sequence(list(range(1, 11)))
    tables.admit(first, [])
    assert tables.match(second) == []
    first.num_computed_tokens = 7
    tables.publish(first)
    assert tables.match(second) == first.block_ids[:1]
    first.num_computed_tokens = 10
    tables.publish(first)
    assert tables.match(second) == first.block_ids[:2]


def test_the_last_token_of_a_fully_cached_prompt_is_left_to_compute() -> None:
    tables = make_tables()
    first = make_sequence(list(range(1, 9)))
    compute(tables, first, 8)
    assert tables.match(make_sequence(list(range(1, 9)))) == first.block_ids[:1]
    assert tables.match(make_sequence(list(range(1, 10)))) == first.block_ids


def test_other_salts_share_nothing() -> None:
    tables = make_tables()
    compute(tables, make_sequence([1] * 9, cache_salt=b"a"), 9)
    assert tables.match(make_sequence([1] * 9, cache_salt=b"b")) == []
    assert len(tables.match(make_sequence([1] * 9, cache_salt=b"a"))) == 2


def test_a_change_in_an_early_block_breaks_the_chain_after_it() -> None:
    tables = make_tables()
    compute(tables, make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), 9)
    assert tables.match(make_sequence([1, 2, 3, 0, 5, 6, 7, 8, 9])) == []


def test_prompt_logprobs_do_not_read_but_write_the_cache() -> None:
    tables = make_tables()
    sampling = SamplingParams(prompt_logprobs=0, n=2)
    compute(tables, make_sequence([1] * 9, sampling=sampling), 9)
    assert tables.match(make_sequence([1] * 9, sampling=sampling)) == []
    assert len(tables.match(make_sequence([1] * 9, sampling=sampling, choice=1))) == 2


def test_without_prefix_cache_nothing_is_found() -> None:
    tables = make_tables(enable_prefix_cache=False)
    compute(tables, make_sequence([1] * 9), 9)
    assert tables.match(make_sequence([1] * 9)) == []


def test_the_end_of_a_released_sequence_is_evicted_before_its_beginning() -> None:
    tables = make_tables(num_blocks=3)
    first = make_sequence(list(range(1, 13)))
    compute(tables, first, 12)
    block_ids = first.block_ids
    tables.release(first)
    tables.admit(make_sequence([9] * 4), [])
    assert tables.match(make_sequence(list(range(1, 14)))) == block_ids[:2]


def test_cached_free_blocks_that_match_are_not_counted_twice_at_admission() -> None:
    tables = make_tables(num_blocks=3)
    first = make_sequence([1] * 9)
    compute(tables, first, 9)
    tables.release(first)
    again = make_sequence([1] * 12)
    matched = tables.match(again)
    assert len(matched) == 2
    assert tables.can_admit(again, matched, num_kept_free=0)
    assert not tables.can_admit(again, matched, num_kept_free=1)
    tables.admit(again, matched)
    assert tables.num_free == 0
    tables.check_integrity([again])


def test_what_a_failed_sequence_left_is_not_found() -> None:
    tables = make_tables()
    first = make_sequence([1] * 9)
    compute(tables, first, 9)
    first.is_distrusted = True
    tables.release(first)
    assert tables.match(make_sequence([1] * 9)) == []
    tables.check_integrity([])
