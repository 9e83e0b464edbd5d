"""Endings of reservations that Redis could not take yet: kept here and brought later, each at most once in effect.

The scripts are idempotent, so an ending whose answer was lost is simply brought again.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Ending:
    """One run of the settle or the refund script; `fields` are for the log if it can never be brought."""

    script: Script
    keys: tuple[str, ...]
    args: Sequence[str | int]
    fields: Mapping[str, object] = field(default_factory=dict)


class EndingQueue:
    """Holds endings while Redis is away.

    Args:
        capacity: endings kept; beyond it the oldest is lost.
        max_age_s: an ending that is older is lost; below the time for which the scripts know an ending again.
        clock: monotonic seconds.
        on_lost: told of every loss; the log line has what an operator needs to book it by hand.
    """

    def __init__(
        self,
        redis: RedisClient,
        *,
        capacity: int,
        max_age_s: float,
        clock: Callable[[], float],
        on_lost: Callable[[], None],
    ) -> None:
        self._redis = redis
        self._capacity = capacity
        self._max_age_s = max_age_s
        self._clock = clock
        self._on_lost = on_lost
        self._waiting: deque[tuple[float, Ending]] = deque()
        self._has_work = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, ending: Ending) -> None:
        if len(self._waiting) >= self._capacity:
            self._lose(self._waiting.popleft()[1])
        self._waiting.append((self._clock(), ending))
        self._has_work.set()
        self._is_empty.clear()

    async def run(self) -> None:
        """Brings endings until cancelled. One failure means that Redis is away, so the pause is for all of them."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            await self._has_work.wait()
            if await self._bring_oldest():
                backoff_s = _FIRST_BACKOFF_S
            else:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def wait_until_empty(self) -> None:
        await self._is_empty.wait()

    async def drain(self, timeout_s: float) -> None:
        """Waits until all are brought, at most `timeout_s`; what is left then is lost."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait_until_empty()
        while self._waiting:
            self._lose(self._waiting.popleft()[1])

    async def _bring_oldest(self) -> bool:
        """False when Redis is away."""
        put_at, ending = self._waiting[0]
        if self._clock() - put_at > self._max_age_s:
            self._lose(ending)
        else:
            try:
                await self._redis.run_script(ending.script, ending.keys, ending.args)
            except RedisAwayError:
                return False
        self._remove(put_at, ending)
        return True

    def _remove(self, put_at: float, ending: Ending) -> None:
        # `put` may have dropped it while it was being brought.
        if self._waiting and self._waiting[0] == (put_at, ending):
            self._waiting.popleft()
        if not self._waiting:
            self._has_work.clear()
            self._is_empty.set()

    def _lose(self, ending: Ending) -> None:
        self._on_lost()
        logger.error("the ending of a reservation is lost", extra={"fields": dict(ending.fields)})
