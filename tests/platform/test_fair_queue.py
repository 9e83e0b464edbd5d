"""What becomes of requests that wait: grants, endings, limits, routers that are gone, a Redis that is away."""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from redis.crc import key_slot

from rempart_platform.endpoints.capacity import Capacity, CapacityRules, capacity_of
from rempart_platform.endpoints.load import EndpointLoad, EndpointModel, EndpointState
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import ServiceTier, Usage
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.fair_queue import (
    DISPATCH,
    ENQUEUE,
    LEASES,
    RELEASE,
    RESTORE,
    SNAPSHOT,
    FairQueue,
    open_fair_queue,
)
from rempart_platform.tenancy.queue_keys import FORMAT, ModelKeys
from rempart_platform.tenancy.queue_testing import RecordingQueueObserver
from rempart_platform.tenancy.queue_values import Place, QueueConfig, QueueRequest, QueueSnapshot
from rempart_platform.tenancy.redis_client import RedisClient, RedisConfig, connect_redis
from rempart_platform.tenancy.testing import own_redis

MODEL = "vendor/{model}"
CONFIG = QueueConfig(lease_s=3600.0, capacity_s=3600.0, ageing_s=3600.0)
SHORT_LEASES = replace(CONFIG, lease_s=1.0, poll_s=0.3)
ONE_ROW, TWO_ROWS = Capacity(1, 10**6), Capacity(2, 10**6)
SOME = Usage(10, 5)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


@pytest.fixture
def observer() -> RecordingQueueObserver:
    return RecordingQueueObserver()


def queue_of(
    redis: RedisClient,
    observer: RecordingQueueObserver,
    capacity: Capacity = ONE_ROW,
    config: QueueConfig = CONFIG,
) -> FairQueue:
    """A queue whose tasks do not run."""
    return FairQueue(redis, config, observer, lambda model: capacity)


def ask(request_id: str, tenant: str = "acme", **changes: object) -> QueueRequest:
    base = QueueRequest(request_id, tenant, MODEL, num_prompt_tokens=10, num_output_tokens=20)
    return replace(base, **changes)  # type: ignore[arg-type]  # the tests name fields of the dataclass


async def refusal(queue: FairQueue, request: QueueRequest) -> RempartError:
    with pytest.raises(RempartError) as raised:
        await queue.acquire(request)
    return raised.value


def held(snapshot: QueueSnapshot) -> tuple[int, int, int]:
    """Requests that wait, rows and tokens that are granted."""
    return snapshot.num_waiting, snapshot.rows, snapshot.tokens


async def test_a_request_is_granted_at_once_and_leaves_nothing(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer, TWO_ROWS)
    first = await queue.acquire(ask("first"))
    second = await queue.acquire(ask("second", num_rows=1, num_output_tokens=7))
    assert first.fence < second.fence
    assert held(await queue.snapshot(MODEL)) == (0, 2, 30 + 17)
    queue.release(first, SOME)
    queue.release(second, SOME)
    queue.release(second, SOME)  # harmless
    await queue.drain()
    assert held(await queue.snapshot(MODEL)) == (0, 0, 0)
    assert queue.num_places == queue.num_waiting == 0
    assert observer.counts == {"granted": 2}
    names = {str(key).rpartition(f":queue:{FORMAT}:")[2] for key in await redis.call(lambda each: each.keys("*"))}
    assert names == {"state", "routers", "service"}


async def test_whoever_waits_is_woken_over_its_own_routers_list(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    def capacity(model: str) -> Capacity:
        return ONE_ROW

    # So long that no steady look can have brought the grant.
    config = replace(CONFIG, poll_s=600.0, lease_s=3600.0)
    async with (
        open_fair_queue(redis, config, observer, capacity) as near,
        open_fair_queue(redis, config, observer, capacity) as far,
    ):
        place = await near.acquire(ask("first"))
        waiting = asyncio.create_task(far.acquire(ask("second")))
        await observer.wait_for("entered", 1)
        near.release(place, SOME)
        granted = await asyncio.wait_for(waiting, 20)
        assert granted.fence > place.fence
        assert granted.waited_s > 0
        far.release(granted, SOME)
    assert (observer.counts["entered"], observer.counts["left"], observer.counts["granted"]) == (1, 1, 2)


async def test_a_grant_whose_message_is_lost_is_found_by_the_next_look(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("first"))
    waiting = await queue.enqueue(ask("second"))
    queue.release(place, SOME)
    await queue.drain()
    (inbox,) = await redis.call(lambda each: each.keys("*inbox*"))
    await redis.call(lambda each: each.delete(inbox))
    assert not waiting.done()
    await queue.dispatch(MODEL)
    assert (await waiting).request.request_id == "second"


async def test_a_lease_that_its_router_knows_nothing_of_is_given_back(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = FairQueue(redis, CONFIG, observer, lambda model: ONE_ROW, router="here")
    await queue.dispatch(MODEL)
    # As when a client leaves before the answer of its request comes.
    args: list[str | int] = ["lost", "here", 2, "acme", "1", "50", 1, 30, 10**9, 1, 10**6, 10**9, 10**9, 10, 10]
    assert (await redis.run_script(ENQUEUE, ModelKeys(MODEL).queue, args))[0] == "granted"
    await queue.dispatch(MODEL)
    await queue.drain()
    assert held(await queue.snapshot(MODEL)) == (0, 0, 0)


async def test_lost_messages_of_many_grants_are_all_found(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer)
    waiting = [await queue.enqueue(ask(f"r{number}")) for number in range(250)]
    roomy = queue_of(redis, observer, Capacity(1000, 10**6))
    await roomy.dispatch(MODEL)
    assert queue.num_places == 1
    await queue.dispatch(MODEL)
    assert all(future.done() for future in waiting)
    assert queue.num_places == 250


async def test_requests_of_a_tenant_come_in_order(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("running"))
    waiting = [await queue.enqueue(ask(f"r{number}")) for number in range(12)]
    for expected in waiting:
        queue.release(place, SOME)
        await queue.drain()
        await queue.take_grants(MODEL, 1.0)
        assert [future.done() for future in waiting].count(True) == waiting.index(expected) + 1
        place = await expected


async def test_the_position_and_an_estimate_of_the_wait_are_told(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("running"))
    for number in range(4):
        await queue.enqueue(ask(f"a{number}", "a"))
    await queue.enqueue(ask("b0", "b"))
    await queue.enqueue(ask("urgent", "c", service_tier=ServiceTier.PRIORITY))
    last = await queue.snapshot(MODEL, tenant="a", request_id="a3")
    only = await queue.snapshot(MODEL, tenant="b", request_id="b0")
    assert (last.is_waiting, last.num_waiting_of_tenant, last.num_ahead) == (True, 4, 5)
    assert (only.is_waiting, only.num_waiting_of_tenant, only.num_ahead) == (True, 1, 2)
    assert last.classes[ServiceTier.DEFAULT].num_waiting == 5
    assert last.classes[ServiceTier.DEFAULT].num_tenants == 2
    assert last.classes[ServiceTier.PRIORITY].num_waiting == 1
    assert not (await queue.snapshot(MODEL, request_id="running")).is_waiting
    for _ in range(2):  # grants have a pace once there were some
        queue.release(place, SOME)
        await queue.drain()
        await queue.take_grants(MODEL, 1.0)
        (place,) = queue._rooms[MODEL].places.values()  # whichever was granted
    assert (await queue.snapshot(MODEL, request_id="a3")).estimate_s > 0


@pytest.mark.parametrize(
    ("tenant", "kind", "name", "limit"),
    [
        ("acme", ErrorKind.RATE_LIMIT_EXCEEDED, "max_waiting_per_tenant", 2),
        ("other", ErrorKind.UNAVAILABLE, "max_waiting", 3),
    ],
)
async def test_only_so_many_may_wait(
    redis: RedisClient,
    observer: RecordingQueueObserver,
    tenant: str,
    kind: ErrorKind,
    name: str,
    limit: int,
) -> None:
    queue = queue_of(redis, observer, config=replace(CONFIG, max_waiting=3, max_waiting_per_tenant=2))
    await queue.acquire(ask("running"))
    waiting = [await queue.enqueue(ask(f"r{number}")) for number in range(2)]
    if tenant == "other":
        waiting.append(await queue.enqueue(ask("of a third", "third")))
    error = await refusal(queue, ask("too-many", tenant))
    assert error.kind is kind
    assert f"({name})" in error.message
    assert str(limit) in error.message
    assert error.retry_after_s is not None
    assert 1 <= error.retry_after_s <= 120
    if kind is ErrorKind.RATE_LIMIT_EXCEEDED:
        assert error.violation is not None
        assert (error.violation.subject, error.violation.metric, error.violation.limit) == ("acme", "waiting", 2)
    assert (await queue.snapshot(MODEL)).num_waiting == len(waiting) == queue.num_waiting
    assert not any(future.done() for future in waiting)


async def test_a_deadline_takes_the_request_out(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("running"))
    error = await refusal(queue, ask("late", timeout_s=0.5))
    assert error.kind is ErrorKind.DEADLINE_EXCEEDED
    await queue.drain()
    assert held(await queue.snapshot(MODEL)) == (0, 1, 30)
    assert queue.num_waiting == 0
    assert observer.counts["refused deadline"] == 1
    queue.release(place, SOME)


async def test_what_is_past_its_deadline_is_not_granted(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("running"))
    late = await queue.enqueue(ask("late", timeout_s=0.0))
    alive = await queue.enqueue(ask("alive"))
    queue.release(place, SOME)
    await queue.drain()
    await queue.take_grants(MODEL, 1.0)
    assert alive.done()
    assert not late.done()
    assert held(await queue.snapshot(MODEL)) == (0, 1, 30)


async def test_clients_that_leave_at_any_moment_leave_nothing(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    rng = random.Random(1)

    async def client(queue: FairQueue, number: int) -> None:
        await asyncio.sleep(rng.uniform(0, 0.05))
        place = await queue.acquire(ask(f"r{number}", f"t{number % 7}"))
        try:
            await asyncio.sleep(rng.uniform(0, 0.01))
        finally:
            queue.release(place, SOME)

    def capacity(model: str) -> Capacity:
        return Capacity(4, 10**6)

    config = replace(CONFIG, poll_s=0.05)
    async with (
        open_fair_queue(redis, config, observer, capacity) as first,
        open_fair_queue(redis, config, observer, capacity) as second,
    ):
        clients = [asyncio.create_task(client((first, second)[number % 2], number)) for number in range(300)]
        for task in rng.sample(clients, 150):
            await asyncio.sleep(rng.uniform(0, 0.002))
            task.cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert results.count(None) >= 150
        while held(await first.snapshot(MODEL)) != (0, 0, 0):
            await observer.wait_for("looked", observer.counts["looked"] + 1)
        assert first.num_places == second.num_places == first.num_waiting == second.num_waiting == 0
    assert observer.counts["entered"] == observer.counts["left"]


async def test_room_is_counted_in_rows_and_tokens_and_the_large_do_not_starve(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer, Capacity(4, 100))
    place = await queue.acquire(ask("running", num_rows=2, num_output_tokens=50))  # 60 tokens
    by_tokens = await queue.enqueue(ask("by-tokens", "a", num_output_tokens=31))
    small = await queue.enqueue(ask("small", "b", num_output_tokens=1))  # would have room, but must not overtake
    huge = await queue.enqueue(ask("huge", "c", num_output_tokens=1000))
    assert held(await queue.snapshot(MODEL)) == (3, 2, 60)
    queue.release(place, SOME)
    await queue.drain()
    await queue.take_grants(MODEL, 1.0)
    assert (by_tokens.done(), small.done(), huge.done()) == (True, True, False)
    for future in (by_tokens, small):
        queue.release(await future, SOME)
    await queue.drain()
    await queue.take_grants(MODEL, 1.0)
    assert huge.done()  # larger than everything, so it runs alone
    by_rows = await queue.enqueue(ask("by-rows"))
    assert not by_rows.done()


async def test_without_sight_of_an_engine_nothing_is_granted(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    blind = queue_of(redis, observer, Capacity(0, 0))
    waiting = await blind.enqueue(ask("r"))
    assert not waiting.done()
    await queue_of(redis, observer).dispatch(MODEL)  # another router, which sees one
    await blind.take_grants(MODEL, 1.0)
    assert waiting.done()


async def test_a_router_that_is_gone_loses_what_it_held_and_nobody_else_does(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    capacity = Capacity(100, 10**6)
    gone, living = (queue_of(redis, observer, capacity) for _ in range(2))
    for number in range(50):
        await living.acquire(ask(f"living-runs-{number}", "living"))
        await gone.acquire(ask(f"gone-runs-{number}", "gone"))
    waiting = []
    for number in range(200):
        waiting.append(await living.enqueue(ask(f"living-waits-{number}", "living")))
        await gone.enqueue(ask(f"gone-waits-{number}", "gone"))
        if number % 10 == 0:
            await living.dispatch(MODEL)
            await gone.dispatch(MODEL)
    assert held(await living.snapshot(MODEL)) == (400, 100, 3000)
    last_heard_s = time.monotonic()
    gone._config = SHORT_LEASES  # only now, so that no lease ends before all of this is there
    await gone.dispatch(MODEL)
    async with asyncio.timeout(60):
        while (await living.snapshot(MODEL, tenant="gone")).num_waiting_of_tenant or observer.counts["swept"] < 250:
            await living.dispatch(MODEL)
            await asyncio.sleep(0.02)
    assert time.monotonic() - last_heard_s >= SHORT_LEASES.lease_s
    assert observer.counts["swept"] == 250
    assert sum(future.done() for future in waiting) == 50  # those whose room the other router held
    assert held(await living.snapshot(MODEL)) == (150, 100, 3000)


async def test_a_router_that_was_taken_for_gone_has_everything_back(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("running"))
    waiting = [await queue.enqueue(ask(f"r{number}")) for number in range(3)]
    await redis.call(lambda each: each.flushall())
    await queue.dispatch(MODEL)
    assert held(await queue.snapshot(MODEL)) == (3, 1, 30)
    queue.release(place, SOME)
    await queue.drain()
    await queue.take_grants(MODEL, 1.0)
    assert [future.done() for future in waiting] == [True, False, False]
    assert (await waiting[0]).fence > place.fence


async def test_a_new_request_finds_out_that_its_router_was_forgotten(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer, TWO_ROWS)
    await queue.acquire(ask("running"))
    await redis.call(lambda each: each.flushall())
    await asyncio.gather(*(queue.enqueue(ask(f"r{number}")) for number in range(5)))
    assert held(await queue.snapshot(MODEL)) == (4, 2, 60)


async def test_an_ending_with_an_old_fence_ends_nothing(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer)
    place = await queue.acquire(ask("r"))
    args: list[str | int] = ["r", place.fence - 1 or 99, 0, 0, 0, 1, 10**9]
    assert (await redis.run_script(RELEASE, ModelKeys(MODEL).queue, args))[0] == "gone"
    assert held(await queue.snapshot(MODEL)) == (0, 1, 30)


async def test_while_redis_is_away_running_requests_go_on_and_new_ones_are_refused(
    observer: RecordingQueueObserver,
) -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server:
        # Time enough for a busy machine, but short enough to wait for.
        config = RedisConfig(server.url, timeout_s=2.0, failures_to_open=1, open_s=0.1)
        async with connect_redis(config) as redis:
            queue = queue_of(redis, observer)
            place = await queue.acquire(ask("running"))
            waiting = await queue.enqueue(ask("waiting"))
            os.kill(server.pid, signal.SIGSTOP)
            try:
                error = await refusal(queue, ask("new"))
                assert error.kind is ErrorKind.UNAVAILABLE
                queue.release(place, SOME)
                await queue.drain()
                assert not waiting.done()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            async with asyncio.timeout(60):
                while not waiting.done():
                    await asyncio.sleep(0.05)
                    try:
                        await queue.dispatch(MODEL)
                    except RempartError:
                        continue  # the breaker is still open
            await queue.drain()
            assert held(await queue.snapshot(MODEL)) == (0, 1, 30)
    assert observer.counts["refused unavailable"] == 1


@dataclass
class History:
    """Random acts of routers that share a queue, and what must follow from them."""

    queues: list[FairQueue]
    rng: random.Random
    places: list[tuple[FairQueue, Place]] = field(default_factory=list)
    waiting: list[tuple[FairQueue, QueueRequest, asyncio.Future[Place]]] = field(default_factory=list)
    num_asked: int = 0

    async def act(self) -> None:
        queue = self.rng.choice(self.queues)
        acts = (self.enqueue, self.enqueue, self.release, self.leave, self.dispatch, self.take)
        await self.rng.choice(acts)(queue)
        self.sort()

    def sort(self) -> None:
        self.places += [(queue, granted.result()) for queue, _, granted in self.waiting if granted.done()]
        self.waiting = [entry for entry in self.waiting if not entry[2].done()]

    async def enqueue(self, queue: FairQueue) -> None:
        self.num_asked += 1
        request = ask(
            f"r{self.num_asked}",
            f"t{self.rng.randrange(6)}",
            num_output_tokens=self.rng.choice((1, 50, 200)),
            num_rows=self.rng.choice((1, 1, 3)),
            service_tier=self.rng.choice(list(ServiceTier)),
        )
        self.waiting.append((queue, request, await queue.enqueue(request)))

    async def release(self, _: FairQueue) -> None:
        if self.places:
            queue, place = self.places.pop(self.rng.randrange(len(self.places)))
            queue.release(place, Usage(10, self.rng.randrange(40)))
            await queue.drain()

    async def leave(self, _: FairQueue) -> None:
        if self.waiting:
            queue, request, _granted = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            queue._abandon(request)  # as when acquire is cancelled
            await queue.drain()

    async def dispatch(self, queue: FairQueue) -> None:
        await queue.dispatch(MODEL)

    async def take(self, queue: FairQueue) -> None:
        await queue.take_grants(MODEL, 0.001)

    async def settle(self) -> None:
        """Lets every router learn what it was granted."""
        for queue in self.queues:
            await queue.dispatch(MODEL)
        self.sort()

    def held(self) -> tuple[int, int, int]:
        granted = [place.request for _, place in self.places]
        rows, tokens = sum(each.num_rows for each in granted), sum(each.num_tokens for each in granted)
        return len(self.waiting), rows, tokens


@pytest.mark.parametrize("reserved", [(0, 0), (4, 390)])
async def test_random_histories_keep_the_counts_true_and_everybody_has_a_turn(
    redis: RedisClient, observer: RecordingQueueObserver, reserved: tuple[int, int]
) -> None:
    config = replace(CONFIG, ageing_s=0.002)
    queues = [queue_of(redis, observer, Capacity(5, 400, *reserved), config) for _ in range(3)]
    history = History(queues, random.Random(9))
    for number in range(400):
        await history.act()
        snapshot = await queues[0].snapshot(MODEL)
        assert snapshot.rows <= 5
        assert snapshot.tokens <= 400
        if number % 20 == 0:
            await history.settle()
            assert held(await queues[0].snapshot(MODEL)) == history.held()
    assert history.num_asked > 100
    while history.places or history.waiting:
        assert (await queues[0].snapshot(MODEL)).rows, "something runs as long as something waits"
        await history.release(queues[0])
        await history.settle()
    assert held(await queues[0].snapshot(MODEL)) == (0, 0, 0)
    left = {str(key).rpartition(f":queue:{FORMAT}:")[2] for key in await redis.call(lambda each: each.keys("*"))}
    assert {name for name in left if not name.startswith(("inbox", "idle"))} == {"state", "routers", "service"}


async def granted_in_order(queue: FairQueue, *requests: QueueRequest) -> list[str]:
    """Ids in the order in which one row serves them, after one that holds it while they come."""
    running = await queue.acquire(ask("running", "other"))
    waiting = {request.request_id: await queue.enqueue(request) for request in requests}
    ids = []
    while waiting:
        queue.release(running, SOME)
        await queue.drain()
        await queue.take_grants(MODEL, 5.0)
        (name,) = (name for name, granted in waiting.items() if granted.done())
        running = waiting.pop(name).result()
        ids.append(name)
    queue.release(running, SOME)
    await queue.drain()
    return ids


@pytest.mark.parametrize(
    ("order", "expected"), [("fifo", ["r0", "r1", "r2", "r3", "r4"]), ("deadline", ["r1", "r3", "r2", "r4", "r0"])]
)
async def test_a_tenants_own_requests_come_by_arrival_or_by_deadline(
    redis: RedisClient, observer: RecordingQueueObserver, order: str, expected: list[str]
) -> None:
    queue = queue_of(redis, observer, config=replace(CONFIG, order=order))  # type: ignore[arg-type]  # one of both
    requests = [ask(f"r{number}", timeout_s=timeout_s) for number, timeout_s in enumerate((900, 100, 300, 200, 400))]
    assert await granted_in_order(queue, *requests) == expected


async def test_deadlines_order_no_tenant_before_another(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer, config=replace(CONFIG, order="deadline"))
    requests = [ask("a0", "a", timeout_s=900), ask("b0", "b", timeout_s=100), ask("b1", "b", timeout_s=50)]
    assert await granted_in_order(queue, *requests) == ["a0", "b1", "b0"]


async def test_one_that_holds_much_leaves_the_reserve_to_others_once_there_are_others(
    redis: RedisClient, observer: RecordingQueueObserver
) -> None:
    queue = queue_of(redis, observer, Capacity(8, 10**6, reserved_rows=2))

    async def granted(tenant: str, count: int) -> list[Place]:
        """Of so many requests; those that would wait are taken back."""
        requests = [ask(f"{tenant}-{number}", tenant) for number in range(count)]
        asked = [await queue.enqueue(request) for request in requests]
        places = [each.result() for each in asked if each.done()]
        for request, each in zip(requests, asked, strict=True):
            if not each.done():
                queue._abandon(request)  # as when acquire is cancelled
        await queue.drain()
        return places

    async def release(places: list[Place]) -> None:
        for place in places:
            queue.release(place, SOME)
        await queue.drain()

    alone = await granted("flood", 12)
    assert len(alone) == 8
    await release(alone)
    await release(await granted("light", 1))
    flood = await granted("flood", 12)
    assert len(flood) == 6
    light = await granted("light", 12)
    assert len(light) == 2
    await release(light[:1])
    assert len(await granted("third", 3)) == 1
    assert (await queue.snapshot(MODEL)).rows == 8


@pytest.mark.parametrize(("rows", "kept"), [(4, 1), (5, 1), (8, 1), (16, 2), (64, 4)])
async def test_a_flood_leaves_rows_free_however_few_an_engine_has(
    redis: RedisClient, observer: RecordingQueueObserver, rows: int, kept: int
) -> None:
    model = EndpointModel(MODEL, max_model_len=4096, vocab_size=8, eos_token_ids=(0,), block_size=64, max_num_rows=rows)
    state = EndpointState("a:1", model, is_ready=True, load=EndpointLoad(num_blocks=10**6))
    queue = queue_of(redis, observer, capacity_of([state], MODEL, CapacityRules()))
    for tenant in ("light", "flood"):
        queue.release(await queue.acquire(ask(tenant, tenant)), SOME)
    await queue.drain()
    flood = [await queue.enqueue(ask(f"flood-{number}", "flood")) for number in range(2 * rows)]
    assert sum(each.done() for each in flood) == rows - kept
    light = [await queue.enqueue(ask(f"light-{number}", "light")) for number in range(kept)]
    assert all(each.done() for each in light)


async def test_tokens_are_reserved_as_rows_are(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    queue = queue_of(redis, observer, Capacity(100, 300, reserved_rows=5, reserved_tokens=60))
    queue.release(await queue.acquire(ask("l", "light")), SOME)
    queue.release(await queue.acquire(ask("f", "flood")), SOME)
    await queue.drain()
    flood = [await queue.enqueue(ask(f"flood-{number}", "flood")) for number in range(10)]
    assert [each.done() for each in flood] == [True] * 8 + [False] * 2
    assert (await queue.enqueue(ask("light", "light"))).done()
    assert (await queue.enqueue(ask("light-2", "light"))).done()
    assert not (await queue.enqueue(ask("light-3", "light"))).done()


async def test_what_waits_in_another_format_stops_nobody(redis: RedisClient, observer: RecordingQueueObserver) -> None:
    waiting, order, ready = (
        ModelKeys(MODEL).queue[part].replace(f":queue:{FORMAT}:", ":queue:") for part in (1, 2, 11)
    )  # as they were called in the first format
    entry = msgspec.msgpack.encode({"class": 2, "tenant": "acme", "rows": 1, "router": "older", "number": 1})
    await redis.call(lambda each: each.hset(waiting, "first", entry))
    await redis.call(lambda each: each.zadd(order, {"2acme 0000000000000001 first": 0}))
    await redis.call(lambda each: each.zadd(ready, {"acme": 0}))
    queue = queue_of(redis, observer)
    assert (await queue.enqueue(ask("second"))).done()
    assert held(await queue.snapshot(MODEL)) == (0, 1, 30)


def test_keys_lie_in_one_slot_of_a_cluster_whatever_the_models_name() -> None:
    slots = set()
    for name in ("m", "vendor/model:tag", "{a}{b}", "ü {"):
        keys = ModelKeys(name)
        of_model = {key_slot(key.encode()) for key in (*keys.queue, keys.inbox("router"))}
        assert len(of_model) == 1
        slots |= of_model
    assert len(slots) == 4


def test_scripts_touch_no_key_that_they_are_not_given_but_lists_of_grants() -> None:
    for script in (ENQUEUE, RELEASE, DISPATCH, LEASES, RESTORE, SNAPSHOT):
        calls = re.findall(r"redis\.call\(\s*'(\w+)'(?:,\s*([^,)\s]+))?", script.text)
        assert len(calls) == script.text.count("redis.call(")
        touched = {key for command, key in calls if command != "TIME"}
        named = {key for key in touched if not re.fullmatch(r"\w+_key", key)}
        # `key` is one of two given ones.
        indexed = {key for key in named if re.fullmatch(r"(ready|idle)_keys\[[\w.]+\]", key)}
        assert named - indexed == {"key", "inbox", "inbox_prefix"}, script.name


@pytest.mark.parametrize("changes", [{"poll_s": 5.0}, {"poll_s": 0.0}, {"max_waiting": 0}])
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        QueueConfig(**changes)  # type: ignore[arg-type]  # the tests name its fields
