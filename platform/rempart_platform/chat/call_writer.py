"""A tool call on its way out."""

from rempart_platform.chat.call_ids import CallCounter
from rempart_platform.chat.json_text import escape, read_object, write_json
from rempart_platform.chat.output import OutputPart, ToolCallArguments, ToolCallStart
from rempart_platform.chat.tool_schema import ToolSchema


class CallWriter:
    """Writes one call's arguments as JSON, its parameters one after another.

    The call starts when a string begins to stream, or when it is complete; up to then it can be forgotten.
    """

    def __init__(self, name: str, schema: ToolSchema, counter: CallCounter) -> None:
        self._name = name
        self._schema = schema
        self._counter = counter
        self._start: ToolCallStart | None = None
        self._ready: dict[str, str] = {}
        """Parameters with their JSON: those that wait for the start, later all that are out."""

    @property
    def is_out(self) -> bool:
        """Whether the call has started."""
        return self._start is not None

    @property
    def is_empty(self) -> bool:
        """Whether the call holds no parameter."""
        return not self._ready

    def has(self, parameter: str) -> bool:
        """Whether the call holds the parameter already."""
        return parameter in self._ready

    def streams(self, parameter: str, is_string: bool | None) -> bool:
        """Whether the parameter's text goes out as it comes."""
        return bool(is_string) and self._schema.may_be_string(parameter) and not self._may_wrap(parameter)

    def add(self, parameter: str, text: str, is_string: bool | None) -> list[OutputPart]:
        """A parameter whose text is whole."""
        value = self._schema.to_json(parameter, text, is_string)
        parts = self._argument(f"{self._separator}{write_json(parameter)}: {value}") if self.is_out else []
        self._ready[parameter] = value
        return parts

    def begin_string(self, parameter: str) -> list[OutputPart]:
        """A parameter whose text goes out as it comes: `string_text` and `end_string` follow."""
        parts = [] if self.is_out else self._begin(self._members())
        parts += self._argument(f'{self._separator}{write_json(parameter)}: "')
        self._ready[parameter] = ""
        return parts

    def string_text(self, text: str) -> list[OutputPart]:
        """A piece of that text."""
        return self._argument(escape(text))

    def end_string(self) -> list[OutputPart]:
        """The text is whole."""
        return self._argument('"')

    def complete(self) -> list[OutputPart]:
        """The call has all its parameters."""
        if self.is_out:
            return self._argument("}")
        if len(self._ready) == 1:
            ((parameter, value),) = self._ready.items()
            return self._begin(self._schema.unwrap(parameter, value) or self._members() + "}")
        return self._begin(self._members() + "}")

    def complete_with(self, arguments: str) -> list[OutputPart]:
        """The call has these arguments. Raises ValueError when they are not the text of a JSON object."""
        members = read_object(arguments)
        if len(members) == 1:
            ((parameter, value),) = members.items()
            unwrapped = self._schema.unwrap(parameter, write_json(value))
            return self._begin(unwrapped or arguments.strip())
        return self._begin(arguments.strip() or "{}")

    @property
    def _separator(self) -> str:
        return ", " if self._ready else ""

    def _may_wrap(self, parameter: str) -> bool:
        return not self._ready and self._schema.is_wrapper(parameter)

    def _members(self) -> str:
        return "{" + ", ".join(f"{write_json(parameter)}: {value}" for parameter, value in self._ready.items())

    def _begin(self, arguments: str) -> list[OutputPart]:
        self._start = self._counter.start(self._name)
        return [self._start, *self._argument(arguments)]

    def _argument(self, text: str) -> list[OutputPart]:
        assert self._start is not None
        return [ToolCallArguments(self._start.index, text)]
