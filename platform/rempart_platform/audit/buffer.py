"""What waits to be sealed: a list, for a request is not to wait for storage."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rempart_platform.audit.chain import time_text
from rempart_platform.audit.values import AuditConfig, Entry, Kind

_logger = logging.getLogger(__name__)
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Waiting:
    """An entry, and who waits until it is sealed."""

    entry: Entry
    sealed: asyncio.Future[None] | None = None


def _day(waiting: Waiting) -> int:
    return int(waiting.entry.at_s // _DAY_S)


class AuditBuffer:
    """Bounded by `max_buffered`, the segment that is being sealed included.

    Args:
        config: bounds, and what to do when they are reached.
        clock: seconds since the epoch.
    """

    def __init__(self, config: AuditConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._waiting: list[Waiting] = []
        self._taken: list[Waiting] = []
        self._num_lost_now = 0
        self._lost_since_s = 0.0
        self._num_refused_now = 0
        self._has_ended = False
        self._wake = asyncio.Event()
        self.num_lost = 0
        """Records that nobody will ever see, in total."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._taken)

    @property
    def is_full(self) -> bool:
        return len(self) >= self._config.max_buffered

    @property
    def oldest_s(self) -> float | None:
        """Since when the oldest record waits, seconds since the epoch; None when none does."""
        for waiting in (self._taken, self._waiting):
            if waiting:
                return waiting[0].entry.at_s
        return None

    def add(self, kind: Kind, fields: Mapping[str, object], *, room: int | None = None) -> None:
        """Keeps a record; one that may be lost only while fewer than `room` wait."""
        if room is not None and len(self) >= room:
            self.lose()
            return
        self._append(Waiting(Entry(self._clock(), kind, fields)))

    def add_refused(self, fields: Mapping[str, object]) -> None:
        """Keeps the outcome of an act of somebody without the right, of the first `max_refused_acts` until a seal."""
        self._num_refused_now += 1
        if self._num_refused_now <= self._config.max_refused_acts:
            self.add(Kind.OUTCOME, fields, room=self._config.room_for_refused)

    def lose(self) -> None:
        """Counts a record for which there is no room."""
        if not self._num_lost_now:
            self._lost_since_s = self._clock()
        self._num_lost_now += 1
        self.num_lost += 1

    def add_and_wait(self, kind: Kind, fields: Mapping[str, object]) -> asyncio.Future[None]:
        """Keeps a record and asks for a seal at once; the future ends when it is sealed."""
        sealed = asyncio.get_running_loop().create_future()
        self._append(Waiting(Entry(self._clock(), kind, fields), sealed))
        self.wake()
        return sealed

    def end(self) -> None:
        """Keeps the last record; what comes after it is lost."""
        self.add(Kind.END, {})
        self._has_ended = True

    def wake(self) -> None:
        """Ends `wait_for_work` at once."""
        self._wake.set()

    async def wait_for_work(self, timeout_s: float) -> None:
        """Returns after that time, when a segment is full or when somebody is in a hurry."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def take(self) -> list[Entry]:
        """The next segment's records, all of one UTC day; they count as waiting until `sealed`. Empty when none is."""
        assert not self._taken, "one segment at a time"
        if not self._waiting:
            return []
        batch = self._waiting[: self._config.max_segment_records]
        day = _day(batch[0])
        count = next((i for i, each in enumerate(batch) if _day(each) != day), len(batch))
        self._taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return [each.entry for each in self._taken]

    def sealed(self) -> None:
        """What was taken is safe."""
        for each in self._taken:
            if each.sealed is not None and not each.sealed.done():
                each.sealed.set_result(None)
        self._taken = []
        if self._num_lost_now:
            self._note_gap()
        num_more = self._num_refused_now - self._config.max_refused_acts
        self._num_refused_now = 0
        if num_more > 0:
            self.add(Kind.OUTCOME, {"who": "", "outcome": "refused", "times": num_more})

    def _append(self, waiting: Waiting) -> None:
        if self._has_ended:
            self.num_lost += 1
            _logger.error("a record came after the end of the audit log", extra={"fields": dict(waiting.entry.fields)})
            return
        self._waiting.append(waiting)
        if len(self._waiting) == self._config.max_segment_records:
            self.wake()

    def _note_gap(self) -> None:
        # The records before the gap still wait, and those after it come now: this is its place.
        now_s = self._clock()
        lost = {"lost": self._num_lost_now, "since": time_text(self._lost_since_s), "until": time_text(now_s)}
        self._num_lost_now = 0
        self._append(Waiting(Entry(now_s, Kind.GAP, lost)))
