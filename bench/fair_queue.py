"""What one Lua call of the fair queue takes, by how many tenants and requests wait: it must grow like a logarithm.

    python bench/fair_queue.py [--quick] [--json FILE]

A real Redis, the scripts that routers run. Each act is measured at a queue of about its size, by the server's own
clock (INFO latencystats: the time in which Redis serves nobody else) and as a whole round trip from here.
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

from bench.report import describe, percentile, table, this_machine, write_json

from rempart_platform.tenancy.fair_queue import DISPATCH, ENQUEUE, RELEASE, SNAPSHOT
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.queue_keys import ModelKeys
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

_SIZES = (
    (100, 1000),
    (1000, 1000),
    (1000, 10_000),
    (1000, 100_000),
    (10_000, 10_000),
    (10_000, 100_000),
    (10_000, 200_000),
)
_QUICK_SIZES = ((100, 1000), (1000, 1000))
_AIM_MS = 2.0
_ROUTER = "bench"
_HOUR_US = 3_600_000_000
_BATCH = 500
_NO_LIMIT = 10**9
_MAX_GRANTS, _MAX_PROMOTED, _MAX_SWEPT = 8, 8, 8  # by one call, as in queue_common.lua


@dataclass(frozen=True, slots=True)
class Times:
    """Of one act at one size, in milliseconds."""

    act: str
    num_tenants: int
    num_waiting: int
    server_p50: float
    server_p99: float
    trip_p50: float
    trip_p99: float


class Queue:
    """One model's queue, by its scripts."""

    def __init__(self, redis: RedisClient, num_tenants: int) -> None:
        self._redis = redis
        self._keys = ModelKeys("bench").queue
        self._rng = random.Random(num_tenants)
        self._tenants = [f"tenant-{number:05}" for number in range(num_tenants)]
        self._ids = itertools.count()
        self.running: list[str] = []

    async def run(self, script: Script, *args: str | int) -> list[str | int | None]:
        return await self._redis.run_script(script, self._keys, args)

    async def look(self, rows: int = 0, *, age_us: int = _HOUR_US) -> None:
        """What every router does steadily; with rows, it sees so much room."""
        await self.run(DISPATCH, _ROUTER, _HOUR_US, *self._room(rows), age_us)

    async def fill(self, num_waiting: int) -> None:
        """Lets requests wait until there are so many: at first one of each tenant."""
        await self.run(DISPATCH, _ROUTER, _HOUR_US, *self._room(1), _HOUR_US)
        self.running.append(str((await self._enqueue(self._tenants[0]))[0]))
        rest = [*self._tenants, *self._rng.choices(self._tenants, k=max(num_waiting - len(self._tenants), 0))]
        for start in range(0, num_waiting, _BATCH):
            calls = [self._enqueue_args(tenant)[1] for tenant in rest[start : min(start + _BATCH, num_waiting)]]
            await self._redis.call(lambda redis, calls=calls: self._in_one(redis, calls))  # type: ignore[misc]

    async def lose_router(self, num_waiting: int) -> None:
        """Leaves that many requests of a router that is gone."""
        routers = self._keys[4]
        await self._redis.call(lambda redis: redis.zadd(routers, {"gone": 10**18}))
        for tenant in self._rng.choices(self._tenants, k=num_waiting):
            args = self._enqueue_args(tenant)[1]
            args[1] = "gone"
            await self.run(ENQUEUE, *args)
        await self._redis.call(lambda redis: redis.zadd(routers, {"gone": 0}))

    async def enqueue(self) -> None:
        """One more request of a tenant drawn at random, which has to wait."""
        await self._enqueue(self._rng.choice(self._tenants))

    async def enqueue_at_once(self) -> None:
        """One that is granted in the same call, where nothing waits; its end is not measured."""
        request_id, reply = await self._enqueue(self._rng.choice(self._tenants), rows=10**6)
        assert reply[0] == "granted"
        self.running.append(request_id)

    async def release(self) -> None:
        """The running request ends, and the next is granted."""
        was, num_granted, _ = await self.run(
            RELEASE, self.running.pop(), 0, self._rng.randint(10, 3000), *self._room(1), _HOUR_US
        )
        assert was == "granted"
        assert num_granted == 1
        granted = await self._redis.call(lambda redis: redis.lpop(ModelKeys("bench").inbox(_ROUTER)))
        self.running.append(str(granted).partition(" ")[0])

    async def snapshot(self) -> None:
        await self.run(SNAPSHOT, self.running[0] if self.running else "", self._tenants[0])

    async def _enqueue(self, tenant: str, rows: int = 1) -> tuple[str, list[str | int | None]]:
        request_id, args = self._enqueue_args(tenant, rows)
        return request_id, await self.run(ENQUEUE, *args)

    def _enqueue_args(self, tenant: str, rows: int = 1) -> tuple[str, list[str | int]]:
        request_id = f"{next(self._ids):032x}"
        charge, service_tier = self._rng.randint(10, 9000), self._rng.choice((1, 2, 2, 2, 3, 4))
        weight = self._rng.choice(("1", "1", "4"))
        who: list[str | int] = [request_id, _ROUTER, service_tier, tenant, weight, charge, 1, charge, _HOUR_US]
        return request_id, [*who, *self._room(rows), _HOUR_US, _NO_LIMIT, _NO_LIMIT, "fifo"]

    def _room(self, rows: int) -> tuple[int, int, int, int, int]:
        return rows, 10**12, 0, 0, _HOUR_US

    async def _in_one(self, redis: object, calls: Sequence[Sequence[str | int]]) -> None:
        async with redis.pipeline(transaction=False) as pipeline:  # type: ignore[attr-defined]  # redis.asyncio.Redis
            for args in calls:
                pipeline.evalsha(ENQUEUE.sha1, len(self._keys), *self._keys, *args)
            await pipeline.execute()


async def measure(
    redis: RedisClient, act: str, size: tuple[int, int], rounds: int, do: Callable[[], Awaitable[None]]
) -> Times:
    """Does it so many times. What else it calls is no script, and so in no number of the server."""
    await redis.call(lambda each: each.config_resetstat())
    trips = []
    for _ in range(rounds):
        started = time.perf_counter()
        await do()
        trips.append((time.perf_counter() - started) * 1e3)
    info = await redis.call(lambda each: each.info("latencystats"))
    server = info["latency_percentiles_usec_evalsha"]
    return Times(
        act,
        *size,
        server_p50=float(server["p50"]) / 1e3,
        server_p99=float(server["p99"]) / 1e3,
        trip_p50=percentile(trips, 50),
        trip_p99=percentile(trips, 99),
    )


async def measure_size(num_tenants: int, num_waiting: int, rounds: int) -> list[Times]:
    """All acts at one size, on a Redis of its own."""
    size = num_tenants, num_waiting
    rounds = min(rounds, num_waiting)
    few = rounds // 16  # of what takes many requests at a time
    async with own_redis() as redis:
        queue = Queue(redis, num_tenants)
        await queue.fill(num_waiting)

        async def take_in() -> Times:
            return await measure(redis, "enqueue, waits", size, rounds, queue.enqueue)

        return [
            await take_in(),
            await measure(redis, "release, grants the next", size, rounds, queue.release),
            await measure(redis, "look of a router", size, rounds, lambda: queue.look(1)),
            await measure(redis, "snapshot", size, rounds, queue.snapshot),
            await measure(redis, f"look that grants {_MAX_GRANTS}", size, few, _granting(queue)),
            await measure(redis, f"look that promotes {_MAX_PROMOTED}", size, few, _promoting(redis, queue)),
            await measure(redis, f"look that sweeps {_MAX_SWEPT}", size, few, await _sweeping(queue, few)),
        ]


def _granting(queue: Queue) -> Callable[[], Awaitable[None]]:
    """Looks that find room for as many as one call may grant."""
    rows = itertools.count(1 + _MAX_GRANTS, _MAX_GRANTS)
    return lambda: queue.look(next(rows))


def _promoting(redis: RedisClient, queue: Queue) -> Callable[[], Awaitable[None]]:
    """Looks that find that many have waited long enough."""

    async def promote() -> None:
        ages = ModelKeys("bench").queue[3]
        oldest = await redis.call(lambda each: each.zrange(ages, 0, _MAX_PROMOTED - 1))
        due = {str(request_id): 0 for request_id in oldest}
        await redis.call(lambda each: each.zadd(ages, due))
        await queue.look(1)

    return promote


async def _sweeping(queue: Queue, rounds: int) -> Callable[[], Awaitable[None]]:
    """Looks that find that a router is gone, with so much that each of them takes away what one call may."""
    await queue.lose_router(rounds * _MAX_SWEPT)
    return lambda: queue.look(1)


async def measure_empty(rounds: int) -> Times:
    """A request that need not wait: what every request costs while there is room."""
    async with own_redis() as redis:
        queue = Queue(redis, 1000)
        await queue.look(10**6)
        await queue.enqueue_at_once()  # the server learns the script
        return await measure(redis, "enqueue, granted at once", (1000, 0), rounds, queue.enqueue_at_once)


async def run(sizes: Sequence[tuple[int, int]], rounds: int) -> list[Times]:
    times = [await measure_empty(rounds)]
    for num_tenants, num_waiting in sizes:
        times += await measure_size(num_tenants, num_waiting, rounds)
    return times


def show(times: Sequence[Times]) -> str:
    head = ("act", "tenants", "waiting", "Redis p50 ms", "Redis p99 ms", "round trip p50 ms", "round trip p99 ms")
    rows = [
        (
            each.act,
            f"{each.num_tenants:,}",
            f"{each.num_waiting:,}",
            *(f"{value:.3f}" for value in (each.server_p50, each.server_p99, each.trip_p50, each.trip_p99)),
        )
        for each in sorted(times, key=lambda each: each.act)
    ]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small queues, few rounds: only shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all numbers there")
    args = parser.parse_args()
    machine = this_machine()
    sizes, rounds = (_QUICK_SIZES, 128) if args.quick else (_SIZES, 3200)
    times = asyncio.run(run(sizes, rounds))
    worst = max(times, key=lambda each: each.server_p99)
    print(f"# One Lua call of the fair queue\n\n{describe(machine)}\n\n{show(times)}\n")
    print(f"Longest p99 in Redis: {worst.server_p99:.3f} ms ({worst.act}); aim: {_AIM_MS} ms.")
    if args.json is not None:
        write_json(args.json, machine, {"fair_queue": [asdict(each) for each in times]})


if __name__ == "__main__":
    main()
