"""Steps between a scheduler and a runner: while one is computed, the next is planned and launched.

A step's plan needs no result of the step before it, so a runner that computes elsewhere (a GPU) never waits for the
scheduler. One that computes at once is done when it has launched, and nothing is ever in flight.
"""

from collections import deque

from rempart_engine.core.runner import PendingStep, Runner
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import StepPlan, TokenEvent

_MAX_IN_FLIGHT = 1
"""Steps that are computed while another is launched: with one, a GPU always has its next work."""


class Pipeline:
    """Drives one scheduler and one runner."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight: deque[PendingStep] = deque()

    def advance(self) -> tuple[StepPlan | None, list[TokenEvent]]:
        """Launch the next step, and commit those that are done or due. The plan is None when none could be launched."""
        self._release_rows()  # of ended sequences, for the plan to use
        plan = self._scheduler.schedule()
        self._release_rows()  # of preempted sequences
        if plan is not None:
            self._in_flight.append(self._runner.launch(plan))
        events: list[TokenEvent] = []
        while self._is_due(launched=plan is not None):
            events += self._scheduler.commit(self._in_flight.popleft().result())
        return plan, events

    @property
    def is_empty(self) -> bool:
        """No step is in flight."""
        return not self._in_flight

    def _is_due(self, *, launched: bool) -> bool:
        """Whether the oldest step in flight is to be waited for.

        The last is done at once only if the runner computes so, or lost the step: then nothing may build upon it.
        """
        if not self._in_flight:
            return False
        return not launched or len(self._in_flight) > _MAX_IN_FLIGHT or self._in_flight[-1].is_done

    def _release_rows(self) -> None:
        if released := self._scheduler.take_released_rows():
            self._runner.release_rows(released)
