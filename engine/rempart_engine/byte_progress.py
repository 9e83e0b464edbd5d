"""How far a work of many bytes is, added up over the threads that do it."""

import threading
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Told how many bytes are done, and of how many; from several threads, one at a time."""


class ByteProgress:
    """Tells after each piece.

    Args:
        total: bytes of all of it.
        on_progress: whom to tell; nobody when None.
    """

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._total = total
        self._on_progress = on_progress

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
