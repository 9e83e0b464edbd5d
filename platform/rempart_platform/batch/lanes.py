"""How much of batch jobs a router does at a time: in all, and of each tenant's use of a model.

    task ─► its lines wait for a place in the lane ─► for one of the tenant, and one of the router ─► in flight
                                 ▲ kept while a line waits for quota or engines     ▲ given back meanwhile

A lane is a tenant's use of one model. So neither one tenant nor a model without engines can hold all of a router's
places, and a tenant's other models go on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.metrics import BatchMetrics


def lane_name(tenant: str, model: str) -> str:
    """As `scripts/batch_claim.lua` writes it."""
    return f"{tenant} {model}"


@dataclass(slots=True, eq=False)
class _Lane:
    num_places: int
    running: Sequence[asyncio.Semaphore]
    """Places in flight: of the tenant, and of the router."""
    places: asyncio.Semaphore = field(init=False)
    opening: set["LaneTask"] = field(default_factory=set)
    """Tasks that have not said how many lines they have."""
    num_tasks: int = 0
    num_lines: int = 0
    """Not answered, of tasks that have said it."""

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.num_places)

    @property
    def has_room(self) -> bool:
        return not self.opening and self.num_lines < self.num_places


class LaneTask:
    """A task's part of the room; made by `Lanes.task`."""

    def __init__(self, lane: _Lane, metrics: BatchMetrics, on_room: Callable[[], None]) -> None:
        self._lane = lane
        self._metrics = metrics
        self._on_room = on_room
        self._num_lines = 0

    def opened(self, num_lines: int) -> None:
        """The task has as many lines to do as this; until it says so, the router takes no further task of the lane."""
        self._lane.opening.discard(self)
        self._lane.num_lines += num_lines - self._num_lines
        self._num_lines = num_lines
        if self._lane.has_room:
            self._on_room()

    @asynccontextmanager
    async def line(self) -> AsyncIterator[None]:
        """A place in the lane."""
        async with self._lane.places:
            yield
        self._num_lines -= 1
        self._lane.num_lines -= 1
        if self._lane.has_room:
            self._on_room()

    @asynccontextmanager
    async def in_flight(self) -> AsyncIterator[None]:
        """A place of the router, for one attempt."""
        of_tenant, of_router = self._lane.running
        async with of_tenant, of_router:
            self._metrics.lines_in_flight.inc()
            try:
                yield
            finally:
                self._metrics.lines_in_flight.dec()


class Lanes:
    """The room of one router.

    Args:
        config: how much there is.
        metrics: told of lines in flight.
        on_room: told when a lane may take a further task.
    """

    def __init__(self, config: BatchConfig, metrics: BatchMetrics, on_room: Callable[[], None]) -> None:
        self._config = config
        self._metrics = metrics
        self._on_room = on_room
        self._running = asyncio.Semaphore(config.max_lines_in_flight)
        self._running_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._lanes: dict[str, _Lane] = {}

    @property
    def has_room(self) -> bool:
        """Whether any further task is to be taken."""
        return sum(lane.num_tasks for lane in self._lanes.values()) < self._config.max_shards

    def full(self) -> list[str]:
        """Of which no further task is to be taken: what is there already keeps all its places busy."""
        most = self._config.max_shards_per_tenant
        return [name for name, lane in self._lanes.items() if lane.num_tasks >= most or not lane.has_room]

    @contextmanager
    def task(self, tenant: str, model: str) -> Iterator[LaneTask]:
        """A task of a lane, from now to the end of the block."""
        name = lane_name(tenant, model)
        lane = self._lanes.get(name)
        if lane is None:
            num_places = self._config.max_lines_in_flight_per_tenant
            of_tenant = self._running_of.setdefault(tenant, asyncio.Semaphore(num_places))
            lane = self._lanes[name] = _Lane(num_places, (of_tenant, self._running))
        task = LaneTask(lane, self._metrics, self._on_room)
        lane.opening.add(task)
        lane.num_tasks += 1
        try:
            yield task
        finally:
            task.opened(0)
            lane.num_tasks -= 1
            if lane.num_tasks == 0:
                del self._lanes[name]
