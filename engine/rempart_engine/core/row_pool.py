"""Which rows of the runner are free."""

import heapq
from collections.abc import Iterable

from rempart_engine.core.integrity import IntegrityError


class RowPool:
    """Rows 0 .. max_num_rows - 1, least free one first so that rows in use stay together.

    A released row is free again only after the runner was told (`take_released`).
    """

    def __init__(self, max_num_rows: int) -> None:
        self._max_num_rows = max_num_rows
        self._free = list(range(max_num_rows))
        self._released: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """Take the least free row; there must be one."""
        return heapq.heappop(self._free)

    def release(self, row: int) -> None:
        """Its sequence ended or was preempted, and no step in flight names it."""
        self._released.append(row)

    def take_released(self) -> list[int]:
        """Rows released since the last call. The caller tells the runner before its next plan; they are free now."""
        released, self._released = self._released, []
        for row in released:
            heapq.heappush(self._free, row)
        return released

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raises IntegrityError unless each row is held, released or free, exactly once."""
        rows = sorted([*held, *self._released, *self._free])
        if rows != list(range(self._max_num_rows)):
            raise IntegrityError(f"rows held, released and free are {rows}")
