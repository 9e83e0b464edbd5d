"""For tests and benches of the fair queue: an observer that remembers, and engines in simulated time."""

import asyncio
import functools
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rempart_platform.generation import Usage
from rempart_platform.tenancy.fair_queue import FairQueue
from rempart_platform.tenancy.queue_values import Place, QueueRequest, QueueSnapshot


@dataclass(slots=True)
class RecordingQueueObserver:
    """Counts what a queue tells, by name; refusals by "refused <reason>"."""

    counts: Counter[str] = field(default_factory=Counter)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for(self, name: str, count: int, timeout_s: float = 20.0) -> None:
        """Waits until something was told so often. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.counts[name] < count:
                self._changed.clear()
                await self._changed.wait()

    def entered(self, tenant: str, model: str) -> None:
        self._count("entered")

    def left(self, tenant: str, model: str) -> None:
        self._count("left")

    def granted(self, place: Place) -> None:
        self._count("granted")

    def refused(self, tenant: str, model: str, reason: str) -> None:
        self._count(f"refused {reason}")

    def swept(self, model: str, count: int) -> None:
        self._count("swept", count)

    def looked(self, model: str, snapshot: QueueSnapshot) -> None:
        self._count("looked")

    def _count(self, name: str, count: int = 1) -> None:
        self.counts[name] += count
        self._changed.set()


@dataclass(frozen=True, slots=True)
class Service:
    """A request that ran, in simulated time."""

    tenant: str
    asked_s: float
    began_s: float
    ended_s: float
    tokens: float

    @property
    def waited_s(self) -> float:
        return self.began_s - self.asked_s

    def tokens_within(self, start_s: float, end_s: float) -> float:
        """Those that were served in a window; a request is served evenly over its time."""
        overlap_s = min(self.ended_s, end_s) - max(self.began_s, start_s)
        return self.tokens * max(overlap_s, 0.0) / (self.ended_s - self.began_s)


class SimulatedEngines:
    """Runs what queues grant, each request at the same speed, in simulated time.

    Args:
        queues: of one Redis, whose own tasks do not run: grants are taken after every step.
        model: whose requests run.
        tokens_per_s: of one row, in units of what a request is charged.
    """

    def __init__(self, queues: Sequence[FairQueue], model: str, tokens_per_s: float) -> None:
        self.now_s = 0.0
        self.served: list[Service] = []
        self.granted_tenants: list[str] = []
        """In order of grants."""
        self._queues = queues
        self._model = model
        self._tokens_per_s = tokens_per_s
        self._num_started = 0
        self._running: list[tuple[float, int, Callable[[], None]]] = []

    async def ask(self, queue: FairQueue, request: QueueRequest, usage: Usage, tokens: float) -> None:
        """Brings a request that will use so much, and be charged `tokens` for it."""
        granted = await queue.enqueue(request)
        granted.add_done_callback(functools.partial(self._start, queue, usage, tokens, self.now_s))
        await asyncio.sleep(0)  # callbacks of what was granted at once

    async def step(self) -> bool:
        """Lets the request end that is the first to end, and grants what then has room. False when none runs."""
        await asyncio.sleep(0)  # callbacks of what was granted
        if not self._running:
            return False
        self.now_s, _, end = heapq.heappop(self._running)
        end()
        for queue in self._queues:
            await queue.drain()
        for queue in self._queues:
            await queue.dispatch(self._model)
        await asyncio.sleep(0)
        return True

    async def run_until(self, at_s: float) -> None:
        """Lets time pass, and all end that does before."""
        while self._running and self._running[0][0] <= at_s:
            await self.step()
        self.now_s = at_s

    def tokens_by_tenant(self, start_s: float, end_s: float) -> dict[str, float]:
        """Served in a window, to everyone who was served at all."""
        totals = dict.fromkeys((service.tenant for service in self.served), 0.0)
        for service in self.served:
            totals[service.tenant] += service.tokens_within(start_s, end_s)
        return totals

    def _start(
        self, queue: FairQueue, usage: Usage, tokens: float, asked_s: float, granted: "asyncio.Future[Place]"
    ) -> None:
        place, began_s = granted.result(), self.now_s
        ended_s = began_s + tokens / self._tokens_per_s
        self.granted_tenants.append(place.request.tenant)

        def end() -> None:
            self.served.append(Service(place.request.tenant, asked_s, began_s, ended_s, tokens))
            queue.release(place, usage)

        self._num_started += 1
        heapq.heappush(self._running, (ended_s, self._num_started, end))


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1.0 when all are equal, 1/n when one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
