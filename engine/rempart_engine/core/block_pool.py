"""Which KV blocks are in use, by how many, and which free one is taken next."""

from collections.abc import Mapping

from rempart_engine.core.integrity import IntegrityError


class BlockPool:
    """A fixed number of KV blocks with reference counts.

    Free blocks stand in one list, taken from its front:

        front | freed, nothing worth keeping (last freed first) | cached, least recently freed first | back

    A cached free block keeps its content until it is taken: whoever finds it again calls `ref` and it leaves the list.
    The list is intrusive (links by block id, with one guard entry), so every operation on one block is O(1).
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._ref_counts = [0] * num_blocks
        self._guard = num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._previous = [num_blocks, *range(num_blocks)]

    def ref_count(self, block_id: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block_id]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, which the caller made sure are there, from the front; each gets one reference."""
        assert count <= self.num_free, f"{count} blocks asked of {self.num_free}"
        block_ids = []
        for _ in range(count):
            block_id = self._next[self._guard]
            self.ref(block_id)
            block_ids.append(block_id)
        return block_ids

    def ref(self, block_id: int) -> None:
        """One more sequence holds the block; a free one leaves the list with its content."""
        if self._ref_counts[block_id] == 0:
            self._unlink(block_id)
        self._ref_counts[block_id] += 1

    def free(self, block_id: int, *, is_cached: bool) -> None:
        """One sequence less holds the block. The last frees it, to the back of the list if its content is cached."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is free already"
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id] == 0:
            self._link(block_id, after=self._previous[self._guard] if is_cached else self._guard)

    def check_integrity(self, expected_ref_counts: Mapping[int, int]) -> None:
        """Compare with the holders that the caller counted (absent: none).

        Raises:
            IntegrityError: a count differs, or the free list is not exactly the blocks without holders.
        """
        for block_id, count in enumerate(self._ref_counts):
            if count != expected_ref_counts.get(block_id, 0):
                raise IntegrityError(
                    f"block {block_id}: {count} references, {expected_ref_counts.get(block_id, 0)} holders"
                )
        free = self._free_list()
        if len(free) != self.num_free or set(free) != {i for i, count in enumerate(self._ref_counts) if count == 0}:
            raise IntegrityError(f"free list {free} does not match {self.num_free} free blocks")

    def _free_list(self) -> list[int]:
        free: list[int] = []
        block_id = self._next[self._guard]
        while block_id != self._guard and len(free) <= self.num_blocks:
            if self._previous[self._next[block_id]] != block_id:
                raise IntegrityError(f"links around block {block_id} are broken")
            free.append(block_id)
            block_id = self._next[block_id]
        return free

    def _link(self, block_id: int, after: int) -> None:
        before = self._next[after]
        self._next[after], self._previous[before] = block_id, block_id
        self._previous[block_id], self._next[block_id] = after, before
        self.num_free += 1

    def _unlink(self, block_id: int) -> None:
        after, before = self._previous[block_id], self._next[block_id]
        self._next[after], self._previous[before] = before, after
        self.num_free -= 1
