"""Tool calls in the text of a DeepSeek-V3.2-Exp answer, between tags that its tokenizer knows as tokens of their own.

{content}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>
"""

from collections.abc import Callable, Iterable, Sequence

from rempart_platform.chat.call_ids import CallCounter
from rempart_platform.chat.call_section import CallSection
from rempart_platform.chat.call_writer import CallWriter
from rempart_platform.chat.marks import MarkScanner
from rempart_platform.chat.message import Tool
from rempart_platform.chat.output import OutputPart
from rempart_platform.chat.prompt import Control
from rempart_platform.chat.tool_schema import ToolSchema, schemas_of

CALLS = Control("<｜tool▁calls▁begin｜>")
END_CALLS = Control("<｜tool▁calls▁end｜>")
CALL = Control("<｜tool▁call▁begin｜>")
END_CALL = Control("<｜tool▁call▁end｜>")
ARGUMENTS = Control("<｜tool▁sep｜>")

TAGS = (CALLS, END_CALLS, CALL, END_CALL, ARGUMENTS)


class ToolTokenCalls:
    """Reads the answer that follows the reasoning. A call comes out when it is whole.

    Args:
        tools: that the model was told of.
        mint_call_id: an id for each call.
    """

    def __init__(self, tools: Iterable[Tool], mint_call_id: Callable[[], str]) -> None:
        self._schemas = schemas_of(tools)
        self._counter = CallCounter(mint_call_id)
        self._scanner = MarkScanner([tag.name for tag in TAGS])
        self._section = CallSection()
        self._place: Callable[[str], list[OutputPart]] = self._in_content
        self._call = ""

    def push(self, text: str) -> Sequence[OutputPart]:
        """Parts that are certain after this text."""
        return [part for item in self._scanner.push(text) for part in self._place(item)]

    def finish(self) -> Sequence[OutputPart]:
        """The text has ended: what was held back."""
        rest = self._scanner.finish()
        return [*(self._place(rest) if rest else []), *self._section.finish()]

    def _in_content(self, item: str) -> list[OutputPart]:
        if item == CALLS.name:
            self._section.open(item)
            self._place = self._between_calls
            return []
        return self._section.content(item)

    def _between_calls(self, item: str) -> list[OutputPart]:
        if item == CALL.name:
            self._section.hold(item)
            self._call = ""
            self._place = self._in_call
            return []
        if item == END_CALLS.name:
            self._place = self._in_content
            return self._section.close(item)
        if not item.strip():
            self._section.hold(item)
            return []
        return self._section.stray(item)

    def _in_call(self, item: str) -> list[OutputPart]:
        if item in (END_CALL.name, END_CALLS.name):
            return self._end_call(item)
        if item in (CALLS.name, CALL.name):  # its end is missing, and so may be part of it
            parts = self._section.stray("")
            self._place = self._between_calls
            return [*parts, *self._between_calls(item)]
        self._call += item
        self._section.hold(item)
        return []

    def _end_call(self, item: str) -> list[OutputPart]:
        name, separator, arguments = self._call.partition(ARGUMENTS.name)
        name = name.strip()
        self._place = self._between_calls
        try:
            if not (name and separator):
                return self._section.stray(item)
            parts = CallWriter(name, self._schemas.get(name, ToolSchema()), self._counter).complete_with(arguments)
        except ValueError:
            return self._section.stray(item)
        self._section.take_call()
        if item == END_CALLS.name:  # the last call's own end is missing, and its arguments are whole without it
            self._place = self._in_content
            parts += self._section.close(item)
        return parts
