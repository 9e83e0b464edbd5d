"""How slowly a client may send what a call waits for.

Only the time spent waiting for the client counts: that our own storage is slow is no fault of it.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from rempart_platform.errors import ErrorKind, RempartError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Pace:
    """`timeout_s` for all of it, and never further behind `min_bytes_per_s` than `grace_s`. 0 bytes/s is no rate."""

    timeout_s: float
    min_bytes_per_s: int
    grace_s: float

    def patience_s(self, num_bytes: int) -> float:
        """How long to wait in all for a client that has sent this much."""
        if self.min_bytes_per_s == 0:
            return self.timeout_s
        return min(self.timeout_s, self.grace_s + num_bytes / self.min_bytes_per_s)


class PacedClient:
    """One client that sends one body, and how long it has been waited for."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._num_bytes = 0
        self._waited_s = 0.0

    async def wait_for(self, message: Awaitable[_T]) -> _T:
        """The client's next message. Raises RempartError REQUEST_TIMEOUT."""
        patience_s = self._pace.patience_s(self._num_bytes)
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            async with asyncio.timeout(max(patience_s - self._waited_s, 0.0)):
                return await message
        except TimeoutError:
            raise RempartError(ErrorKind.REQUEST_TIMEOUT, "The request's body took too long.") from None
        finally:
            self._waited_s += clock() - started

    def count(self, num_bytes: int) -> None:
        """Takes note of what came."""
        self._num_bytes += num_bytes
