"""A priority queue from which any item can be removed."""

import heapq
from typing import Generic, TypeVar

K = TypeVar("K", bound=tuple[float, ...])
V = TypeVar("V")

_SLACK = 64


class RemovableHeap(Generic[K, V]):
    """Items by unique key, least key first. Every operation is O(log n) amortised.

    A removed key stays in the heap until it comes to the top, or until such dead keys outnumber the living.
    """

    def __init__(self) -> None:
        self._items: dict[K, V] = {}
        self._heap: list[K] = []

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def push(self, key: K, item: V) -> None:
        """Add an item; its key must not be present."""
        assert key not in self._items, f"key {key} is present already"
        self._items[key] = item
        heapq.heappush(self._heap, key)

    def first(self) -> tuple[K, V] | None:
        """Least key and its item, left in place; None when empty."""
        while self._heap:
            key = self._heap[0]
            if key in self._items:
                return key, self._items[key]
            heapq.heappop(self._heap)
        return None

    def remove(self, key: K) -> V:
        """Take out the item with this key; it must be present."""
        item = self._items.pop(key)
        if len(self._heap) > 2 * len(self._items) + _SLACK:
            self._heap = list(self._items)
            heapq.heapify(self._heap)
        return item
