"""What was found a moment ago, so that not every request has to ask again."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memory(Generic[K, V]):
    """Values by key; the least recently used goes first.

    Args:
        capacity: values at most.
        memory_s: for how long a value holds.
        clock: monotonic seconds.
    """

    def __init__(self, capacity: int, memory_s: float, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._memory_s = memory_s
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> tuple[V] | None:
        """A one-tuple of what is remembered, which may be that there is nothing; None when nothing is."""
        entry = self._entries.get(key)
        if entry is None or entry[0] <= self._clock():
            return None
        self._entries.move_to_end(key)
        return (entry[1],)

    def put(self, key: K, value: V, asked_at: float) -> None:
        """Keeps what was true at `asked_at`, a time of the same clock."""
        self._entries[key] = (asked_at + self._memory_s, value)
        self._entries.move_to_end(key)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
