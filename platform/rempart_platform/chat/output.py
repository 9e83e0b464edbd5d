"""What a model's text turns out to be, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentText:
    """Part of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """Part of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The answer calls a function; its arguments follow. `index` counts the calls of the answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments: all pieces together are the text of a JSON object.

    A call that the model breaks off, or that the text ends within, is left without its last brace: whoever parses it
    sees that it is not whole.
    """

    index: int
    text: str


OutputPart = ContentText | ReasoningText | ToolCallStart | ToolCallArguments


class OutputParser(Protocol):
    """Reads one choice's text as it comes. No part holds a tag, or a piece of one, that has a place in the format."""

    def push(self, text: str) -> Sequence[OutputPart]:
        """Parts that are certain after this text."""
        ...

    def finish(self) -> Sequence[OutputPart]:
        """The text has ended: what was held back. Malformed calls come out as content, nothing is lost."""
        ...
