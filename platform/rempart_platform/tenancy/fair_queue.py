"""The fair queue: all requests of all routers that wait for one model, in one Redis.

    enqueue ─► room and nobody waits ────────────────────────────► granted ─► place, until it is released
       │  └──► waits ─► dispatch, by whichever router calls next ──┘ │            └─► dispatch again
       │         └─► deadline, client gone: taken out                └─► router gone: swept after `lease_s`
       └─► too many wait: refused

Classes are served in order, and age. Inside a class, the tenant with the lowest virtual time is next, which is what it
was served in tokens per weight (start-time fair queueing); requests of a tenant come in order of arrival, or of their
deadlines. A request is charged its worst case when it is granted, and the truth when it ends. Where several tenants are
served, some of the room is kept for those that hold little of it: they need not wait until another's request ends.

Every transition is one Lua script that runs as a whole, by the server's clock, in time that grows with the logarithm of
what waits. Grants come over a list of each router; what is lost on that way, a steady look at all leases finds again.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rempart_platform.endpoints.capacity import Capacity
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.lua import Script, load_script
from rempart_platform.tenancy.queue_keys import ModelKeys
from rempart_platform.tenancy.queue_values import (
    EnqueueReply,
    Place,
    QueueConfig,
    QueueRequest,
    QueueSnapshot,
)
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient, ScriptReply

logger = logging.getLogger(__name__)

_COMMON = "queue_common"
ENQUEUE = load_script("queue_enqueue", shared=_COMMON)
RELEASE = load_script("queue_release", shared=_COMMON, runs_when_memory_is_full=True)
DISPATCH = load_script("queue_dispatch", shared=_COMMON, runs_when_memory_is_full=True)
LEASES = load_script("queue_leases", shared=_COMMON, runs_when_memory_is_full=True)
RESTORE = load_script("queue_restore", shared=_COMMON, runs_when_memory_is_full=True)
SNAPSHOT = load_script("queue_snapshot", shared=_COMMON, runs_when_memory_is_full=True)

_MAX_GRANTED, _MAX_SWEPT = 8, 8  # by one call, as in queue_common.lua
_MAX_GRANTS_TAKEN = 100
_ANY_FENCE = 0
_NOTHING = Usage(0, 0)


class QueueObserver(Protocol):
    """What the queue tells metrics."""

    def entered(self, tenant: str, model: str) -> None:
        """A request begins to wait."""

    def left(self, tenant: str, model: str) -> None:
        """A request no longer waits, however that ended."""

    def granted(self, place: Place) -> None:
        """Also to requests that did not have to wait."""

    def refused(self, tenant: str, model: str, reason: str) -> None:
        """`reason`: "full", "tenant_full", "deadline" or "unavailable"."""

    def swept(self, model: str, count: int) -> None:
        """What a router that is gone had there was taken away."""

    def looked(self, model: str, snapshot: QueueSnapshot) -> None:
        """How the whole queue stands; every `poll_s`."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A request of this router that is not granted yet."""

    request: QueueRequest
    entered_s: float
    granted: asyncio.Future[Place]
    is_waiting: bool = False
    """Redis said so."""


@dataclass(slots=True, eq=False)
class _Room:
    """What this router has in the queue of one model."""

    model: str
    keys: tuple[str, ...]
    inbox: str
    entries: dict[str, _Entry] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    endings: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Fence and charge of what ended here, until Redis knows it."""
    unsent: set[str] = field(default_factory=set)
    """Those of them that Redis could not take, and that the next dispatch brings."""
    num_waiting: int = 0
    has_waiting: asyncio.Event = field(default_factory=asyncio.Event)
    introducing: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_introductions: int = 0
    told_rows: int = 0
    """Of the engines' room, as Redis was told last."""


class FairQueue:
    """The places of this router; made by `open_fair_queue`, which also runs its tasks.

    Args:
        redis: where the queue is.
        config: its limits.
        observer: told of what happens.
        capacity: of all endpoints of a model, as this router sees them now.
        clock: monotonic seconds.
        router: name of this router among all of one Redis; drawn at random when None.
    """

    def __init__(
        self,
        redis: RedisClient,
        config: QueueConfig,
        observer: QueueObserver,
        capacity: Callable[[str], Capacity],
        clock: Callable[[], float] = time.monotonic,
        router: str | None = None,
    ) -> None:
        self._redis = redis
        self._config = config
        self._observer = observer
        self._capacity = capacity
        self._clock = clock
        self._router = router if router is not None else secrets.token_hex(8)
        self._rooms: dict[str, _Room] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._room_tasks: list[asyncio.Task[None]] = []

    @property
    def num_waiting(self) -> int:
        """Requests of this router that wait."""
        return sum(room.num_waiting for room in self._rooms.values())

    @property
    def num_places(self) -> int:
        """Places of this router that are not released."""
        return sum(len(room.places) for room in self._rooms.values())

    async def acquire(self, request: QueueRequest) -> Place:
        """A place in the engines; waits for it, and takes the request out of the queue when cancelled.

        Raises:
            RempartError: RATE_LIMIT_EXCEEDED or UNAVAILABLE when too many wait; DEADLINE_EXCEEDED; UNAVAILABLE when
                Redis does not answer.
        """
        entered_s = self._clock()
        try:
            async with asyncio.timeout(request.timeout_s):
                granted = await self.enqueue(request)
                try:
                    return await granted
                except BaseException:
                    self._abandon(request)
                    raise
        except TimeoutError:
            self._observer.refused(request.tenant, request.model, "deadline")
            message = f"The request ran out of time after waiting {self._clock() - entered_s:.1f} s for an engine."
            raise RempartError(ErrorKind.DEADLINE_EXCEEDED, message) from None

    async def enqueue(self, request: QueueRequest) -> asyncio.Future[Place]:
        """Asks for a place, and returns without waiting for it; cancelling this or the future does not take it back.

        Raises:
            RempartError: as `acquire` does, except for the deadline.
        """
        room = self._room(request.model)
        try:
            entry = _Entry(request, self._clock(), asyncio.get_running_loop().create_future())
            room.entries[request.request_id] = entry
            try:
                reply = await self._enter(room, entry)
            except BaseException:
                self._abandon(request)
                raise
        except RedisAwayError:
            self._observer.refused(request.tenant, request.model, "unavailable")
            raise
        if reply.outcome == "granted":
            self._grant(room, request.request_id, reply.fence)
        elif reply.outcome == "waiting":
            self._start_waiting(room, entry)
        else:
            room.entries.pop(request.request_id, None)
            self._observer.refused(request.tenant, request.model, reply.outcome)
            raise reply.refusal(request, self._config)
        return entry.granted

    def release(self, place: Place, usage: Usage) -> None:
        """Gives a place back with what was used. Again is harmless. Redis learns it in the background."""
        room = self._room(place.request.model)
        if room.places.pop(place.request.request_id, None) is not None:
            self._end(room, place.request.request_id, place.fence, self._config.charge(usage))

    async def dispatch(self, model: str) -> None:
        """Says that this router lives, grants what has room, and finds again what got lost; called every `poll_s`.

        Raises RedisAwayError.
        """
        room = self._room(model)
        for request_id in tuple(room.unsent):
            room.unsent.discard(request_id)
            await self._send_ending(room, request_id)
        while await self._look(room):
            pass

    async def take_grants(self, model: str, block_s: float) -> int:
        """Takes what was granted to requests of this router, waiting for it if need be. Returns how many.

        Raises RedisAwayError.
        """
        room = self._room(model)
        reply = await self._redis.call(
            lambda redis: redis.blmpop(block_s, 1, room.inbox, direction="LEFT", count=_MAX_GRANTS_TAKEN)
        )
        messages = reply[1] if reply else []
        for message in messages:
            request_id, _, fence = str(message).partition(" ")
            self._take(room, request_id, int(fence))
        return len(messages)

    async def snapshot(self, model: str, *, tenant: str = "", request_id: str = "") -> QueueSnapshot:
        """How the queue of a model stands, of all routers; of a tenant and a request there if they are named."""
        return QueueSnapshot.parse(await self._run(self._room(model), SNAPSHOT, request_id, tenant))

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Takes grants and dispatches in tasks of its own from now on."""
        self._tasks = tasks
        for room in self._rooms.values():
            self._start_room(room)

    async def close(self) -> None:
        """Lets endings under way reach Redis, at most `drain_s`, and ends the tasks."""
        for task in self._room_tasks:
            task.cancel()
        if self._endings:
            await asyncio.wait(self._endings, timeout=self._config.drain_s)
        for task in self._endings:
            task.cancel()

    async def drain(self) -> None:
        """Waits until what was released has reached Redis."""
        while self._endings:
            await asyncio.wait(self._endings)

    def _room(self, model: str) -> _Room:
        room = self._rooms.get(model)
        if room is None:
            keys = ModelKeys(model)
            room = self._rooms[model] = _Room(model, keys.queue, keys.inbox(self._router))
            self._start_room(room)
        return room

    def _start_room(self, room: _Room) -> None:
        if self._tasks is not None:
            self._room_tasks.append(self._tasks.create_task(self._keep_dispatching(room)))
            self._room_tasks.append(self._tasks.create_task(self._keep_taking(room)))

    async def _enter(self, room: _Room, entry: _Entry) -> EnqueueReply:
        while True:
            num_introductions = room.num_introductions
            if num_introductions == 0:
                await self._introduce(room, num_introductions)
            reply = EnqueueReply.parse(await self._run(room, ENQUEUE, *self._enqueue_args(entry)))
            if reply.num_swept:
                self._observer.swept(room.model, reply.num_swept)
            if reply.outcome != "unknown":
                return reply
            await self._introduce(room, num_introductions)

    async def _introduce(self, room: _Room, num_introductions: int) -> None:
        """Makes this router known to Redis, once for all requests that find that it is not."""
        async with room.introducing:
            if room.num_introductions == num_introductions:
                await self._look(room)

    async def _look(self, room: _Room) -> bool:
        """One run of the dispatch script. Returns whether it left work for another."""
        config = self._config
        lease_us, age_us = _microseconds(config.lease_s), _microseconds(config.ageing_s)
        seen = self._seen(room.model)
        room.told_rows = seen[0]
        reply = await self._run(room, DISPATCH, self._router, lease_us, *seen, age_us)
        was_known, num_granted, num_swept, num_leases = (int(number or 0) for number in reply)
        room.num_introductions += 1
        if not was_known:
            await self._restore(room)
        if num_leases != len(room.places):
            await self._compare(room)
        if num_swept:
            self._observer.swept(room.model, num_swept)
        return num_granted >= _MAX_GRANTED or num_swept >= _MAX_SWEPT

    async def _compare(self, room: _Room) -> None:
        """Looks through all leases that Redis has for this router: some may be granted and not known here."""
        after = ""
        while page := await self._run(room, LEASES, self._router, after):
            for request_id, fence in zip(page[::2], page[1::2], strict=True):
                self._take(room, str(request_id), int(fence or 0))
            after = f"{page[-2]} {page[-1]}"

    async def _restore(self, room: _Room) -> None:
        """Tells Redis what it forgot of this router, or swept while it heard nothing from here."""
        for place in tuple(room.places.values()):
            args = self._args(place.request)
            await self._run(room, RESTORE, *args, place.fence)
        for entry in [entry for entry in room.entries.values() if entry.is_waiting]:
            if entry.granted.done():
                continue
            reply = EnqueueReply.parse(await self._run(room, ENQUEUE, *self._enqueue_args(entry, is_restored=True)))
            if reply.outcome == "granted":
                self._take(room, entry.request.request_id, reply.fence)

    def _take(self, room: _Room, request_id: str, fence: int) -> None:
        """A grant that Redis told of: for whoever waits for it, else it is given back."""
        if request_id in room.entries:
            self._grant(room, request_id, fence)
        elif request_id not in room.places and request_id not in room.endings:
            self._end(room, request_id, fence, 0.0)

    def _grant(self, room: _Room, request_id: str, fence: int) -> None:
        entry = room.entries.pop(request_id, None)
        if entry is None:
            return  # the list of grants was quicker than the answer
        self._stop_waiting(room, entry)
        waited_s = self._clock() - entry.entered_s
        place = Place(entry.request, fence, waited_s)
        room.places[request_id] = place
        self._observer.granted(place)
        if not entry.granted.done():
            entry.granted.set_result(place)

    def _abandon(self, request: QueueRequest) -> None:
        """Takes a request out wherever it is; its client is gone."""
        room = self._room(request.model)
        place = room.places.get(request.request_id)
        if place is not None:
            self.release(place, _NOTHING)
            return
        entry = room.entries.pop(request.request_id, None)
        if entry is not None:
            self._stop_waiting(room, entry)
            self._end(room, request.request_id, _ANY_FENCE, 0.0)

    def _start_waiting(self, room: _Room, entry: _Entry) -> None:
        if room.entries.get(entry.request.request_id) is not entry:
            return  # granted before this answer came
        entry.is_waiting = True
        room.num_waiting += 1
        room.has_waiting.set()
        self._observer.entered(entry.request.tenant, room.model)

    def _stop_waiting(self, room: _Room, entry: _Entry) -> None:
        if not entry.is_waiting:
            return
        entry.is_waiting = False
        room.num_waiting -= 1
        if room.num_waiting == 0:
            room.has_waiting.clear()
        self._observer.left(entry.request.tenant, room.model)

    def _end(self, room: _Room, request_id: str, fence: int, charge: float) -> None:
        room.endings[request_id] = fence, charge
        task = asyncio.get_running_loop().create_task(self._send_ending(room, request_id))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _send_ending(self, room: _Room, request_id: str) -> None:
        fence, charge = room.endings[request_id]
        args = (request_id, fence, charge, *self._seen(room.model), _microseconds(self._config.ageing_s))
        try:
            *_, num_swept = await self._run(room, RELEASE, *args)
        except RedisAwayError:
            room.unsent.add(request_id)
            return
        del room.endings[request_id]
        if num_swept:
            self._observer.swept(room.model, int(num_swept))

    async def _keep_dispatching(self, room: _Room) -> None:
        """Dispatches until cancelled."""
        while True:
            try:
                await self.dispatch(room.model)
                self._observer.looked(room.model, await self.snapshot(room.model))
            except RedisAwayError:
                # What expires meanwhile is restored when Redis is back.
                fields = {"model": room.model, "num_waiting": room.num_waiting, "num_places": len(room.places)}
                logger.warning("the fair queue could not be reached", extra={"fields": fields})
            await asyncio.sleep(self._config.poll_s)

    async def _keep_taking(self, room: _Room) -> None:
        """Takes grants while something waits, until cancelled."""
        block_s = min(self._config.block_s, self._redis.timeout_s / 2)
        while True:
            await room.has_waiting.wait()
            try:
                num_taken = await self.take_grants(room.model, block_s)
                if num_taken == 0 and self._capacity(room.model).rows > room.told_rows:
                    await self._look(room)
            except RedisAwayError as error:
                await asyncio.sleep(error.retry_after_s or self._config.poll_s)

    def _enqueue_args(self, entry: _Entry, *, is_restored: bool = False) -> Iterable[str | int | float]:
        config, request = self._config, entry.request
        left_s = max(request.timeout_s - (self._clock() - entry.entered_s), 0.0)
        limits = (2**53, 2**53) if is_restored else (config.max_waiting, config.max_waiting_per_tenant)
        args = (*self._args(request), _microseconds(left_s), *self._seen(request.model))
        return (*args, _microseconds(config.ageing_s), *limits, config.order)

    def _args(self, request: QueueRequest) -> tuple[str | int | float, ...]:
        usage = Usage(request.num_prompt_tokens, request.num_output_tokens)
        charge = self._config.charge(usage)
        flow = (int(request.service_tier), request.tenant, request.weight, charge)
        return (request.request_id, self._router, *flow, request.num_rows, request.num_tokens)

    def _seen(self, model: str) -> tuple[int, int, int, int, int]:
        seen = self._capacity(model)
        lasts_us = _microseconds(self._config.capacity_s)
        return seen.rows, seen.tokens, seen.reserved_rows, seen.reserved_tokens, lasts_us

    async def _run(self, room: _Room, script: Script, *args: str | int | float) -> ScriptReply:
        return await self._redis.run_script(script, room.keys, args)


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


@asynccontextmanager
async def open_fair_queue(
    redis: RedisClient,
    config: QueueConfig,
    observer: QueueObserver,
    capacity: Callable[[str], Capacity],
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[FairQueue]:
    """A queue with its tasks, two for each model."""
    queue = FairQueue(redis, config, observer, capacity, clock)
    async with asyncio.TaskGroup() as tasks:
        queue.start(tasks)
        try:
            yield queue
        finally:
            await queue.close()
