"""How many tokens a step may have: fewer after one for which memory did not suffice."""

_LEAST_TOKENS = 16
_STEPS_TO_RECOVER = 64
"""Good steps before the budget grows again; each loss costs a step, so at most one in so many is lost."""


class StepBudget:
    """Starts at `most` tokens. Halves with every loss, doubles after a run of good steps."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = min(most, _LEAST_TOKENS)
        self._num_good_steps = 0
        self.num_tokens = most

    @property
    def is_least(self) -> bool:
        """A loss cannot make it smaller."""
        return self.num_tokens == self._least

    def shrink(self) -> None:
        """A step was lost."""
        self.num_tokens = max(self.num_tokens // 2, self._least)
        self._num_good_steps = 0

    def note_good_step(self) -> None:
        """A step was not lost."""
        self._num_good_steps += 1
        if self._num_good_steps >= _STEPS_TO_RECOVER and self.num_tokens < self._most:
            self.num_tokens = min(2 * self.num_tokens, self._most)
            self._num_good_steps = 0
