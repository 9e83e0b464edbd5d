"""When to stop asking a service that does not answer: closed → open for a while → one probe → closed again."""

from collections.abc import Callable


class Breaker:
    """Opens after consecutive failures, so that callers fail at once instead of each waiting for a time-out.

    Args:
        failures_to_open: consecutive failures that open it.
        open_s: seconds it stays open before one probe may pass.
        clock: monotonic seconds.
    """

    def __init__(self, failures_to_open: int, open_s: float, clock: Callable[[], float]) -> None:
        self._failures_to_open = failures_to_open
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._failures_to_open

    @property
    def refuses(self) -> bool:
        """Whether a call would have to wait at this moment. Unlike `wait_s`, asking makes nobody the probe."""
        return self.is_open and self._clock() < self._open_until

    def wait_s(self) -> float:
        """Seconds until a call may pass; 0.0 lets this call pass.

        When the open time is over, one caller becomes the probe: the time starts anew for all others.
        """
        if not self.is_open:
            return 0.0
        now = self._clock()
        if now < self._open_until:
            return self._open_until - now
        self._open_until = now + self._open_s
        return 0.0

    def record_success(self) -> None:
        self._failures = 0

    def record_failure(self) -> None:
        self._failures += 1
        if self.is_open:
            self._open_until = self._clock() + self._open_s
