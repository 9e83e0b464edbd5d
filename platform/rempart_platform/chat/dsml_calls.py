"""Tool calls in the text of a DeepSeek-V3.2 answer, in every form that the model was seen to write.

    content ─ <function_calls> ─► between calls ─ <invoke> ─► inside a call ─ <parameter> ─► inside a value
       ▲                           │       ▲                   │        ▲                     │
       └───── </function_calls> ───┘       └──── </invoke> ────┘        └─── </parameter> ────┘

Each tag may carry the mark or not, and a call may hold one JSON object instead of parameters; a marked call of a known
tool needs no `function_calls` around it. What fits nowhere is content; a call that was already on its way when that
showed breaks off there: its arguments are never closed, so that nobody runs it by mistake.
"""

from collections.abc import Callable, Iterable, Sequence

from rempart_platform.chat.call_ids import CallCounter
from rempart_platform.chat.call_section import CallSection
from rempart_platform.chat.call_writer import CallWriter
from rempart_platform.chat.dsml_scanner import DsmlScanner, Tag, Text
from rempart_platform.chat.message import Tool
from rempart_platform.chat.output import OutputPart
from rempart_platform.chat.tool_schema import ToolSchema, schemas_of

_Place = Callable[[Text | Tag], list[OutputPart]]


class DsmlCalls:
    """Reads the answer that follows the reasoning.

    Args:
        tools: that the model was told of.
        mint_call_id: an id for each call.
    """

    def __init__(self, tools: Iterable[Tool], mint_call_id: Callable[[], str]) -> None:
        self._schemas = schemas_of(tools)
        self._counter = CallCounter(mint_call_id)
        self._scanner = DsmlScanner()
        self._section = CallSection()
        self._place: _Place = self._in_content
        self._is_wrapped = False
        """Whether the calls stand inside of a `function_calls` element."""
        self._call = CallWriter("", ToolSchema(), self._counter)
        self._parameter = Tag("", "parameter", is_closing=False, is_marked=False)
        self._value = ""
        """Text of the parameter, or the JSON of the whole call, that has not gone out."""
        self._is_streaming = False
        """Whether the parameter's text goes out as it comes."""
        self._doubtful = ""
        """A closing tag in the other style than the opening one, with whitespace: the value's end, or part of it."""

    def push(self, text: str) -> Sequence[OutputPart]:
        """Parts that are certain after this text."""
        return [part for item in self._scanner.push(text) for part in self._place(item)]

    def finish(self) -> Sequence[OutputPart]:
        """The text has ended: what was held back."""
        rest = self._scanner.finish()
        parts = self._place(Text(rest)) if rest else []
        return [*parts, *self._section.finish()]

    def _in_content(self, item: Text | Tag) -> list[OutputPart]:
        if isinstance(item, Tag) and item.opens("function_calls"):
            self._is_wrapped = True
            self._section.open(item.raw)
            self._place = self._between_calls
            return []
        if isinstance(item, Tag) and item.opens("invoke") and item.is_marked and item.name in self._schemas:
            self._is_wrapped = False
            self._section.open("")
            return self._begin_call(item)
        return self._section.content(item.raw)

    def _between_calls(self, item: Text | Tag) -> list[OutputPart]:
        if isinstance(item, Tag):
            if item.opens("invoke"):
                return self._begin_call(item)
            if item.closes("function_calls") and self._is_wrapped:
                self._place = self._in_content
                return self._section.close(item.raw)
        if not item.raw.strip():
            self._section.hold(item.raw)
            return []
        if not self._is_wrapped:
            self._place = self._in_content
            return self._in_content(item)
        return self._section.stray(item.raw)

    def _begin_call(self, invoke: Tag) -> list[OutputPart]:
        self._section.hold(invoke.raw)
        self._call = CallWriter(invoke.name, self._schemas.get(invoke.name, ToolSchema()), self._counter)
        self._place = self._in_call
        return []

    def _in_call(self, item: Text | Tag) -> list[OutputPart]:
        if isinstance(item, Tag):
            if item.closes("invoke"):
                return self._end_call(self._call.complete())
            if item.opens("parameter") and not self._call.has(item.name):
                return self._begin_value(item)
            return self._break_off(item)
        if item.raw.strip() and not (self._call.is_empty and item.raw.lstrip().startswith("{")):
            return self._break_off(item)
        self._section.hold(item.raw)
        if item.raw.strip():
            self._value = item.raw
            self._place = self._in_json
        return []

    def _end_call(self, parts: list[OutputPart]) -> list[OutputPart]:
        self._section.take_call()
        self._place = self._between_calls
        return parts

    def _in_json(self, item: Text | Tag) -> list[OutputPart]:
        if isinstance(item, Tag):
            if item.closes("invoke"):
                try:
                    return self._end_call(self._call.complete_with(self._value))
                except ValueError:
                    return self._break_off(item)
            if item.is_marked:
                return self._break_off(item)
        self._value += item.raw
        self._section.hold(item.raw)
        return []

    def _begin_value(self, parameter: Tag) -> list[OutputPart]:
        self._section.hold(parameter.raw)
        self._parameter = parameter
        self._value = ""
        self._place = self._in_value
        self._is_streaming = self._call.streams(parameter.name, parameter.is_string)
        if not self._is_streaming:
            return []
        self._section.take_call()
        return self._call.begin_string(parameter.name)

    def _in_value(self, item: Text | Tag) -> list[OutputPart]:
        if isinstance(item, Tag):
            if item.closes("parameter"):
                self._section.hold(item.raw)
                if item.is_marked == self._parameter.is_marked:
                    return self._end_value()
                self._doubtful = item.raw
                self._place = self._behind_doubtful_end
                return []
            if item.is_marked or not self._parameter.is_marked:
                return self._break_off(item)  # the value's own end is missing
        self._section.hold(item.raw)
        return self._say_value(item.raw)

    def _behind_doubtful_end(self, item: Text | Tag) -> list[OutputPart]:
        """The other style's tag ends the value only when the call goes on, or ends, behind it."""
        if isinstance(item, Tag) and (item.opens("parameter") or item.closes("invoke")):
            return [*self._end_value(), *self._in_call(item)]
        if isinstance(item, Text) and not item.raw.strip():
            self._section.hold(item.raw)
            self._doubtful += item.raw
            return []
        self._place = self._in_value
        return [*self._say_value(self._doubtful), *self._in_value(item)]

    def _say_value(self, text: str) -> list[OutputPart]:
        """Takes text of the value that the section holds."""
        if self._is_streaming:
            self._section.take_call()
            return self._call.string_text(text)
        self._value += text
        return []

    def _end_value(self) -> list[OutputPart]:
        self._place = self._in_call
        parameter = self._parameter
        if self._is_streaming:
            parts = self._call.end_string()
        else:
            parts = self._call.add(parameter.name, self._value, parameter.is_string)
        if self._call.is_out:
            self._section.take_call()
        return parts

    def _break_off(self, item: Text | Tag) -> list[OutputPart]:
        """The call is none, from its beginning or from here on."""
        if isinstance(item, Tag) and item.opens("invoke"):
            return [*self._section.stray(""), *self._begin_call(item)]
        is_end = not self._is_wrapped or (isinstance(item, Tag) and item.closes("function_calls"))
        self._place = self._in_content if is_end else self._between_calls
        return self._section.stray(item.raw)
