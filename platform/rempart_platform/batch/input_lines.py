"""An input file as lines, in memory that does not grow with the file."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import msgspec

_BYTES_PER_TURN = 64 * 1024  # online requests of this router wait meanwhile


class LineTooLongError(Exception):
    """Line `number` is longer than allowed; what follows it was not read."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line that is not blank."""

    number: int
    """From 1; blank lines count."""
    start: int
    """Its first byte in the file."""
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class RequestLine(msgspec.Struct, frozen=True):
    """A line of OpenAI's batch input. Unknown fields are ignored, as there."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class RequestBody(msgspec.Struct, frozen=True):
    """What a job must know of a body."""

    model: str


async def read_lines(pieces: AsyncIterator[bytes], max_line_bytes: int) -> AsyncIterator[InputLine]:
    """Raises LineTooLongError."""
    number, start, rest = 1, 0, b""
    async for piece in _short(pieces):
        *whole, rest = (rest + piece).split(b"\n")
        for data in whole:
            if len(data) > max_line_bytes:
                raise LineTooLongError(number)
            if data.strip():
                yield InputLine(number, start, data)
            number, start = number + 1, start + len(data) + 1
        if len(rest) > max_line_bytes:
            raise LineTooLongError(number)
        await asyncio.sleep(0)
    if rest.strip():
        yield InputLine(number, start, rest)


async def _short(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        for start in range(0, len(piece), _BYTES_PER_TURN):
            yield piece[start : start + _BYTES_PER_TURN]


def split_lines(data: bytes, first_number: int, start: int = 0) -> Iterator[InputLine]:
    """The lines of a part of a file that begins with line `first_number` at byte `start`."""
    for number, line in enumerate(data.split(b"\n"), first_number):
        if line.strip():
            yield InputLine(number, start, line)
        start += len(line) + 1
