"""The engine core's loop, one pass after another:

    inbox -> add / abort -> expire -> schedule -> launch -> commit -> one update to the front

The inbox is emptied without waiting while there is work, and waited on when there is none. An error of one row ends
that row (the scheduler sees to it); an exception out of a step ends the process, for what the runner holds after it
cannot be trusted.
"""

import time
from collections.abc import Callable

from rempart_engine.core.pipeline import Pipeline
from rempart_engine.core.request import RequestId
from rempart_engine.core.runner import Runner
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import TokenEvent
from rempart_engine.ipc import Abort, Configure, CoreChannel, FrontMessage, Start, StepUpdate, Stop

_BLOCKED_WAIT_S = 0.01
"""Pause when there is work but none can be scheduled: only a message or a deadline can change that."""


class EngineLoop:
    """Drives one scheduler and one runner for the front at the other end of the channel."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        channel: CoreChannel,
        heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = Pipeline(scheduler, runner)
        self._channel = channel
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._is_blocked = False

    def sign_of_life(self) -> None:
        """Tell the load."""
        self._channel.send(self._pass([]))

    def run(self) -> None:
        """Return when the front says stop; raise FrontGoneError when it is gone, and whatever a step raises."""
        while True:
            messages = self._channel.receive(self._patience_s())
            if any(isinstance(message, Stop) for message in messages):
                return
            self._channel.send(self._pass(messages))

    def _patience_s(self) -> float:
        if not self._scheduler.has_work:
            return self._heartbeat_s
        return _BLOCKED_WAIT_S if self._is_blocked else 0.0

    def _pass(self, messages: list[FrontMessage]) -> StepUpdate:
        events: list[TokenEvent] = []
        for message in messages:
            events += self._apply(message)
        events += self._scheduler.expire(self._clock())
        started_at = self._clock()
        had_nothing_to_commit = self._pipeline.is_empty
        plan, brought = self._pipeline.advance()
        events += brought
        self._is_blocked = plan is None and had_nothing_to_commit
        return StepUpdate(
            events=tuple(events),
            load=self._scheduler.load(),
            num_tokens=0 if plan is None else plan.num_tokens,
            duration_s=self._clock() - started_at,
        )

    def _apply(self, message: FrontMessage) -> list[TokenEvent]:
        match message:
            case Start(request=request):
                return self._scheduler.add(request)
            case Abort(request_id=request_id):
                return self._scheduler.abort(RequestId(request_id))
            case Configure() | Stop():
                raise AssertionError(f"{type(message).__name__} does not belong into the loop")
