"""Notices an engine core that lives but does not move."""


class SilenceWatch:
    """Counts how long the core has been silent; it speaks after every step, and at a steady pace while idle.

    Silence is summed over ticks, each counted as at most two tick lengths: when this process itself did not run
    (stopped by a debugger, a frozen machine), the core is not blamed for that time.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._silence_s = 0.0

    @property
    def tick_s(self) -> float:
        """How often to call `is_hung`."""
        return min(1.0, self._timeout_s / 4)

    def heard(self) -> None:
        """The core said something."""
        self._silence_s = 0.0

    def is_hung(self, elapsed_s: float) -> bool:
        """Count a tick that took `elapsed_s`; true once the silence has reached the timeout."""
        self._silence_s += min(elapsed_s, 2 * self.tick_s)
        return self._silence_s >= self._timeout_s
