"""For tests of what stands on tenancy: a real Redis of one's own, and an observer that remembers."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from rempart_platform.errors import RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient, RedisConfig, connect_redis


def patient(url: str) -> RedisConfig:
    """Time-outs that a busy machine does not meet by chance."""
    return RedisConfig(url, timeout_s=10.0)


@asynccontextmanager
async def own_redis() -> AsyncIterator[RedisClient]:
    """A client of a fresh, empty server."""
    async with embedded_redis(EmbeddedRedisConfig()) as server, connect_redis(patient(server.url)) as redis:
        yield redis


@contextmanager
def away_after(redis: RedisClient, num_calls: int) -> Iterator[None]:
    """Within, Redis does what it is asked so many times, and is away then."""
    call, run_script = redis.call, redis.run_script
    left = num_calls

    def take_one() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RedisAwayError(0.0, may_have_run=False)

    async def call_at_first(*args: Any) -> Any:
        take_one()
        return await call(*args)

    async def run_at_first(*args: Any) -> Any:
        take_one()
        return await run_script(*args)

    with patch.object(redis, "call", call_at_first), patch.object(redis, "run_script", run_at_first):
        yield


async def take_turns(
    redis: RedisClient, order: random.Random, *acts: Callable[[RedisClient], Awaitable[object]]
) -> None:
    """Runs acts on one Redis; one at a time does its next call, and chance says which. A RempartError ends an act."""
    waiting: list[asyncio.Future[None]] = []
    num_running = len(acts)

    def give_turn() -> None:
        if waiting and len(waiting) == num_running:
            waiting.pop(order.randrange(len(waiting))).set_result(None)

    class InTurn(RedisClient):
        def __init__(self) -> None:
            """Has no connections of its own."""

        async def call(self, *args: Any) -> Any:
            await self._turn()
            return await redis.call(*args)

        async def run_script(self, *args: Any) -> Any:
            await self._turn()
            return await redis.run_script(*args)

        async def _turn(self) -> None:
            waiting.append(asyncio.get_running_loop().create_future())
            mine = waiting[-1]
            give_turn()
            await mine

    async def run(act: Callable[[RedisClient], Awaitable[object]]) -> None:
        nonlocal num_running
        with contextlib.suppress(RempartError):
            await act(InTurn())
        num_running -= 1
        give_turn()

    async with asyncio.TaskGroup() as tasks:
        for act in acts:
            tasks.create_task(run(act))


@dataclass(slots=True)
class RecordingObserver:
    """Counts what a ledger tells, by name; refusals also by "refused <reason>"."""

    counts: Counter[str] = field(default_factory=Counter)

    def reserved(self, tenant: str) -> None:
        self.counts["reserved"] += 1

    def refused(self, tenant: str, reason: str) -> None:
        self.counts["refused"] += 1
        self.counts[f"refused {reason}"] += 1

    def overgranted(self, tokens: int) -> None:
        self.counts["overgranted"] += tokens

    def settled(self, tenant: str, model: str, usage: Usage) -> None:
        self.counts["settled"] += 1

    def refunded(self, tenant: str) -> None:
        self.counts["refunded"] += 1

    def ending_deferred(self) -> None:
        self.counts["ending_deferred"] += 1

    def ending_lost(self) -> None:
        self.counts["ending_lost"] += 1

    def leases_expired(self, count: int) -> None:
        self.counts["leases_expired"] += count
