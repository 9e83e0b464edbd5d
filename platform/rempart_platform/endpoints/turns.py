"""Whose turn it is: how many streams are woken in one pass of the event loop.

    update of a step ── events for 256 streams ──► 8 are woken now │ the next pass: 8 more │ ...
                                                     └── between them the loop reads what else has come

A router with time to spare wakes every stream at once. One that is behind reads the engine's next steps before it has
woken all, and a stream then takes several tokens in one turn, which costs little more than one token does.
"""

import asyncio
from collections import deque

_MANY_PASSES = 64
"""No stream waits for more than a few times so many; a step is read in each, far less than a stream may buffer."""


class Turns:
    """Wakes streams in the order in which they asked.

    Args:
        per_pass: the most that are woken in one pass of the event loop; more where so many ask that the last would
            wait for hundreds of passes.
    """

    def __init__(self, per_pass: int) -> None:
        self._per_pass = per_pass
        self._num_left = per_pass
        self._asked: deque[asyncio.Future[None]] = deque()
        self._has_next_pass = False

    def ask(self, sleeper: asyncio.Future[None]) -> None:
        """Wakes it, in this pass or in one that follows."""
        self._asked.append(sleeper)
        if not self._has_next_pass:
            self._has_next_pass = True
            asyncio.get_running_loop().call_soon(self._begin_pass)
        self._wake()

    def _begin_pass(self) -> None:
        self._num_left = max(self._per_pass, len(self._asked) // _MANY_PASSES)
        self._has_next_pass = bool(self._asked)
        if self._has_next_pass:
            asyncio.get_running_loop().call_soon(self._begin_pass)
            self._wake()

    def _wake(self) -> None:
        while self._num_left and self._asked:
            sleeper = self._asked.popleft()
            if not sleeper.done():  # its stream was left meanwhile
                sleeper.set_result(None)
                self._num_left -= 1
