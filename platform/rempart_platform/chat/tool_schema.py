"""What a tool's JSON schema says of its parameters' types, as far as a call's arguments need it."""

from collections.abc import Iterable, Mapping

from rempart_platform.chat.json_text import read_json, read_object, write_json
from rempart_platform.chat.message import Tool

_WRAPPERS = ("arguments", "input")
"""Names that models give to all arguments as one, instead of their own names."""


class ToolSchema:
    """The parameters of one tool; of a tool without a schema, nothing is known."""

    def __init__(self, parameters: object = None) -> None:
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        self._properties: Mapping[str, object] = properties if isinstance(properties, dict) else {}

    def may_be_string(self, name: str) -> bool:
        """Whether the parameter takes a string."""
        types = _types(self._properties.get(name))
        return not types or "string" in types

    def is_wrapper(self, name: str) -> bool:
        """Whether a parameter of this name may hold the arguments instead of being one."""
        return bool(self._properties) and name in _WRAPPERS and name not in self._properties

    def unwrap(self, name: str, value: str) -> str | None:
        """The arguments that a call's only parameter holds, JSON for JSON; None when they are no others than itself."""
        if not self.is_wrapper(name):
            return None
        inner = read_json(value)
        try:
            members = read_object(inner) if isinstance(inner, str) else inner
        except ValueError:
            return None
        is_inside = isinstance(members, dict) and members.keys() <= self._properties.keys()
        return write_json(members) if is_inside else None

    def to_json(self, name: str, text: str, is_string: bool | None) -> str:
        """A parameter's text as JSON of a type that the schema allows, or as the string that it is.

        Args:
            name: of the parameter.
            text: its text.
            is_string: what the call says of it: a string as it stands, a JSON value, or nothing.
        """
        types = _types(self._properties.get(name))
        if is_string and (not types or "string" in types):
            return write_json(text)
        plain = text.strip()
        fitting = (_fitted(spelling, types) for spelling in _spellings(plain, types))
        value = next((value for value in fitting if value is not None), None)
        if value is not None:
            return value
        if is_string or "string" in types or not _is_json(plain):
            return write_json(text)
        return plain


def schemas_of(tools: Iterable[Tool]) -> dict[str, ToolSchema]:
    """By name of the tool."""
    return {tool.name: ToolSchema(read_json(tool.parameters) if tool.parameters else None) for tool in tools}


def _types(schema: object) -> frozenset[str]:
    """JSON types that the schema names; none when it does not tell."""
    if not isinstance(schema, dict):
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    if isinstance(values := schema.get("enum"), list):
        return frozenset(_type_of(value) for value in values)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        kinds = [_types(choice) for choice in choices]
        return frozenset().union(*kinds) if all(kinds) else frozenset()
    return frozenset()


def _spellings(text: str, types: frozenset[str]) -> tuple[str, ...]:
    """What may be meant, likeliest first; models write Python's words where a schema asks for JSON's."""
    if not types:
        return (text,)
    return (text, text.lower(), "null" if text in ("None", "") else text)


def _fitted(text: str, types: frozenset[str]) -> str | None:
    """`text` when it is JSON of one of the types, or a whole number in an integer's place; None when it is not."""
    try:
        value = read_json(text)
    except ValueError:
        return None
    kind = _type_of(value)
    if not types or kind in types or (kind == "integer" and "number" in types):
        return text
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return str(int(value))
    return None


def _is_json(text: str) -> bool:
    return _fitted(text, frozenset()) is not None


def _type_of(value: object) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case None:
            return "null"
        case _:
            return "object"
