"""The tags of tool calls in a text that comes in pieces: marked `<｜DSML｜invoke ...>`, plain `<invoke ...>`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

_MARK = "｜DSML｜"
_KINDS = ("function_calls", "invoke", "parameter")
_MAX_ATTRIBUTE_CHARS = 512
"""A tag is held back until it is whole; no name of a function or parameter is that long."""

_TAG = re.compile(
    rf"<(?P<slash>/?)(?P<mark>{_MARK})?(?P<kind>{'|'.join(_KINDS)})"
    rf"(?P<attributes>[^<>]{{0,{_MAX_ATTRIBUTE_CHARS}}})>"
)
_ATTRIBUTES = re.compile(r'(\s+[a-z]+\s*=\s*"[^"]*")*\s*')
_ATTRIBUTE = re.compile(r'([a-z]+)\s*=\s*"([^"]*)"')
_HEADS = tuple(f"<{slash}{mark}{kind}" for slash in ("", "/") for mark in ("", _MARK) for kind in _KINDS)

MARKED_CALLS = f"<{_MARK}function_calls>"
"""The opening tag of a block of calls, as the model was trained to write it."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is part of no tag."""

    raw: str


@dataclass(frozen=True, slots=True)
class Tag:
    """A whole tag. `is_string` is None for a parameter that does not say it."""

    raw: str
    kind: Literal["function_calls", "invoke", "parameter"]
    is_closing: bool
    is_marked: bool
    name: str = ""
    is_string: bool | None = None

    def opens(self, kind: str) -> bool:
        """Whether it begins an element of this kind."""
        return self.kind == kind and not self.is_closing

    def closes(self, kind: str) -> bool:
        """Whether it ends an element of this kind."""
        return self.kind == kind and self.is_closing


class DsmlScanner:
    """Splits text into tags and what is between them; holds back what may become a tag."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> Iterator[Text | Tag]:
        """Whole tags, and pieces of text without any."""
        buffer, self._held = self._held + text, ""
        said = position = 0
        while (position := buffer.find("<", position)) >= 0:
            found = _TAG.match(buffer, position)
            tag = _tag(found) if found else None
            if tag is not None:
                if said < position:
                    yield Text(buffer[said:position])
                yield tag
                said = position = position + len(tag.raw)
            elif found is None and _may_become_tag(buffer, position):
                self._held = buffer[position:]
                buffer = buffer[:position]
            else:
                position += 1
        if said < len(buffer):
            yield Text(buffer[said:])

    def finish(self) -> str:
        """The text held back: it has not become a tag."""
        held, self._held = self._held, ""
        return held


def _may_become_tag(buffer: str, position: int) -> bool:
    """Whether `buffer` from `position` to its end is the beginning of a tag."""
    if buffer.find("<", position + 1) >= 0 or buffer.find(">", position) >= 0:
        return False
    length = len(buffer) - position
    return any(
        head.startswith(buffer[position:]) if length < len(head) else _is_within_attributes(buffer, position, head)
        for head in _HEADS
    )


def _is_within_attributes(buffer: str, position: int, head: str) -> bool:
    return buffer.startswith(head, position) and len(buffer) - position - len(head) <= _MAX_ATTRIBUTE_CHARS


def _tag(found: re.Match[str]) -> Tag | None:
    """The tag; None when its attributes are not those of its kind."""
    kind = cast(Literal["function_calls", "invoke", "parameter"], found["kind"])
    if not _ATTRIBUTES.fullmatch(found["attributes"]):
        return None
    attributes: dict[str, str] = dict(_ATTRIBUTE.findall(found["attributes"]))
    is_closing = bool(found["slash"])
    name, string = attributes.pop("name", None), attributes.pop("string", None)
    needs_name = kind != "function_calls" and not is_closing
    if attributes or needs_name != bool(name) or string not in (None, "true", "false"):
        return None
    return Tag(
        found[0], kind, is_closing, bool(found["mark"]), name or "", None if string is None else string == "true"
    )
