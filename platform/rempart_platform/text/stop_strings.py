"""Find stop strings in text that comes in pieces, giving out all text that cannot be part of one.

`StopStrings` is an Aho-Corasick automaton: its state after a character is the longest suffix of the text that begins
some stop string. The depth of the state is thus exactly how many characters must be held back.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class _State:
    depth: int
    next: dict[str, "_State"] = field(default_factory=dict)
    fallback: "_State | None" = None
    stop_length: int = 0
    """Length of the longest stop string that ends in this state; 0 when none does."""


class StopStrings:
    """An automaton over non-empty stop strings; built once for a request, shared by its choices."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.root = _State(depth=0)
        for stop in stops:
            state = self.root
            for character in stop:
                state = state.next.setdefault(character, _State(depth=state.depth + 1))
            state.stop_length = len(stop)
        self._link()

    def _link(self) -> None:
        """Sets each state's fallback: the longest proper suffix of it that is a state too."""
        waiting = deque(self.root.next.values())
        for state in waiting:
            state.fallback = self.root
        while waiting:
            state = waiting.popleft()
            for character, child in state.next.items():
                child.fallback = self.step(state.fallback, character)
                child.stop_length = child.stop_length or child.fallback.stop_length
                waiting.append(child)

    def step(self, state: _State | None, character: str) -> _State:
        """The state after one more character."""
        while state is not None:
            following = state.next.get(character)
            if following is not None:
                return following
            state = state.fallback
        return self.root


class StopScan(msgspec.Struct, frozen=True):
    """`text` may be given out. After a match, `stop` is the string that ended the output."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Holds back what may become a stop string. Of several, the one that is complete first ends the text."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = stops.root
        self._held = ""

    def push(self, text: str) -> StopScan:
        """Takes more text. Nothing may be pushed after a match."""
        if not self._stops.root.next:
            return StopScan(text)
        buffer = self._held + text
        state = self._state
        for position in range(len(self._held), len(buffer)):
            state = self._stops.step(state, buffer[position])
            if state.stop_length:
                end = position + 1
                self._held = ""
                return StopScan(buffer[: end - state.stop_length], buffer[end - state.stop_length : end])
        self._state = state
        cut = len(buffer) - state.depth
        self._held = buffer[cut:]
        return StopScan(buffer[:cut])

    def finish(self) -> str:
        """The text held back: it has not become a stop string."""
        held, self._held, self._state = self._held, "", self._stops.root
        return held
