"""How a job's input is cut into shards. Kept beside the job's results, so that it is cut once and for all."""

import msgspec

from rempart_platform.batch.input_lines import InputLine

_MAX_SPAN = 4096  # lines of a shard and blank ones among them, for a worker splits a shard at one go


class Shard(msgspec.Struct, frozen=True):
    """Lines that are worked on together: bytes `start` to `end` of the input."""

    start: int
    end: int
    first_line: int
    num_lines: int
    """Blank ones do not count."""


class Plan(msgspec.Struct, frozen=True):
    """All of a valid input."""

    model: str
    shards: tuple[Shard, ...]

    @property
    def num_lines(self) -> int:
        return sum(shard.num_lines for shard in self.shards)

    def encoded(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> "Plan":
        return msgspec.json.decode(data, type=Plan)


class Cutter:
    """Takes lines one by one.

    Args:
        max_lines: of a shard.
        max_bytes: of a shard, unless a single line is longer.
    """

    def __init__(self, max_lines: int, max_bytes: int) -> None:
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._done: list[Shard] = []
        self._current: Shard | None = None

    def add(self, line: InputLine) -> None:
        current = self._current
        if current is not None and self._fits(current, line):
            self._current = Shard(current.start, line.end, current.first_line, current.num_lines + 1)
            return
        self._close()
        self._current = Shard(line.start, line.end, line.number, 1)

    def _fits(self, shard: Shard, line: InputLine) -> bool:
        return (
            shard.num_lines < self._max_lines
            and line.end - shard.start <= self._max_bytes
            and line.number - shard.first_line < max(_MAX_SPAN, self._max_lines)
        )

    def shards(self) -> tuple[Shard, ...]:
        self._close()
        return tuple(self._done)

    def _close(self) -> None:
        if self._current is not None:
            self._done.append(self._current)
            self._current = None
