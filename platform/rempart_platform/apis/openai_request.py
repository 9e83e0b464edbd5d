"""What routes take from a request and answer it with."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller


class Identified(Protocol):
    """An object of a list."""

    @property
    def id(self) -> str: ...


_Object = TypeVar("_Object", bound=Identified)


class Page(msgspec.Struct, Generic[_Object]):
    """A part of a list, as OpenAI's clients read it."""

    data: Sequence[_Object]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"

    @classmethod
    def of(cls, objects: Sequence[_Object], *, has_more: bool) -> "Page[_Object]":
        return cls(objects, has_more, objects[0].id if objects else None, objects[-1].id if objects else None)


def caller_of(request: Request) -> Caller:
    """Who asks, as `http_envelope.Authentication` found out."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def limit_of(request: Request) -> int | None:
    """How many objects the query asks for. Raises RempartError INVALID_REQUEST."""
    text = request.query_params.get("limit")
    return None if text is None else parse_number(text, "limit")


def parse_number(text: str, param: str) -> int:
    """Raises RempartError INVALID_REQUEST."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RempartError(ErrorKind.INVALID_REQUEST, f"'{param}' must be a number.", param=param)
    return int(text)


def json_response(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
