"""Which KV blocks a sequence holds: taken at admission, grown as it decodes, found again through the prefix cache."""

from collections import Counter
from collections.abc import Iterable

from rempart_engine.core.block_pool import BlockPool
from rempart_engine.core.prefix_cache import PrefixCache, block_digest, root_digest
from rempart_engine.core.sequence import Sequence


class BlockTables:
    """Gives KV blocks to sequences and takes them back.

    A sequence is admitted with blocks for all its tokens, so that a prefill, once begun, never lacks one; after that
    it grows block by block as it decodes.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool) -> None:
        self._block_size = block_size
        self._enable_prefix_cache = enable_prefix_cache
        self._pool = BlockPool(num_blocks)
        self._prefix_cache = PrefixCache()

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its beginning. Its last token is always left to compute: without it there are no logits."""
        if not self._enable_prefix_cache or sequence.wants_prompt_logprobs:
            return []
        most = (len(sequence.token_ids) - 1) // self._block_size
        self._extend_digests(sequence, most)
        return self._prefix_cache.match(sequence.block_digests[:most])

    def can_admit(self, sequence: Sequence, matched: list[int], num_kept_free: int) -> bool:
        """Whether all its tokens find place beside the matched blocks, and so many blocks stay free."""
        num_fresh = self._num_blocks_for(sequence.num_tokens) - len(matched)
        num_matched_free = sum(self._pool.ref_count(block_id) == 0 for block_id in matched)
        return num_fresh + num_matched_free + num_kept_free <= self._pool.num_free

    def admit(self, sequence: Sequence, matched: list[int]) -> None:
        """Give it the matched blocks, whose tokens count as computed, and fresh ones for the rest."""
        for block_id in matched:
            self._pool.ref(block_id)
        sequence.block_ids = matched + self._take(self._num_blocks_for(sequence.num_tokens) - len(matched))
        sequence.num_cached_blocks = len(matched)
        sequence.num_computed_tokens = len(matched) * self._block_size

    def num_lacking(self, sequence: Sequence, num_new_tokens: int) -> int:
        """How many blocks it needs beyond those it has to compute so many more tokens."""
        return self._num_blocks_for(sequence.num_scheduled_tokens + num_new_tokens) - len(sequence.block_ids)

    def num_spare_tokens(self, sequence: Sequence) -> int:
        """How many tokens its table has room for beyond those that are scheduled."""
        return len(sequence.block_ids) * self._block_size - sequence.num_scheduled_tokens

    def grow(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """Append so many fresh blocks to its table; the caller made sure that they are free."""
        block_ids = self._take(count)
        sequence.block_ids += block_ids
        return tuple(block_ids)

    def publish(self, sequence: Sequence) -> None:
        """Make its full blocks findable, as far as their tokens are computed."""
        num_full = sequence.num_computed_tokens // self._block_size
        if not self._enable_prefix_cache or num_full <= sequence.num_cached_blocks:
            return
        self._extend_digests(sequence, num_full)
        for position in range(sequence.num_cached_blocks, num_full):
            self._prefix_cache.insert(sequence.block_digests[position], sequence.block_ids[position])
        sequence.num_cached_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all its blocks back, the last first: the beginning of a prompt is the likeliest to be shared.

        Blocks of a distrusted sequence leave the prefix cache, so that nobody else reads what a failed step wrote.
        """
        for block_id in reversed(sequence.block_ids):
            if sequence.is_distrusted:
                self._prefix_cache.evict(block_id)
            self._pool.free(block_id, is_cached=block_id in self._prefix_cache)
        sequence.block_ids = []

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises IntegrityError when blocks and holders, all sequences that have a table, do not add up."""
        self._pool.check_integrity(Counter(block_id for sequence in holders for block_id in sequence.block_ids))
        self._prefix_cache.check_integrity()

    def _take(self, count: int) -> list[int]:
        block_ids = self._pool.allocate(count)
        for block_id in block_ids:
            self._prefix_cache.evict(block_id)
        return block_ids

    def _extend_digests(self, sequence: Sequence, count: int) -> None:
        digests, size = sequence.block_digests, self._block_size
        for start in range(len(digests) * size, count * size, size):
            parent = digests[-1] if digests else root_digest(sequence.request.cache_salt)
            digests.append(block_digest(parent, sequence.token_ids[start : start + size]))

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
