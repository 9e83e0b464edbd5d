"""Pages of lists as OpenAI's clients ask for them and read them."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request

from rempart_platform.apis.batch_rules import check_page_size, page_of
from rempart_platform.errors import ErrorKind, RempartError


class Identified(Protocol):
    """An object of a list."""

    @property
    def id(self) -> str: ...


_Object = TypeVar("_Object", bound=Identified)


class Page(msgspec.Struct, Generic[_Object]):
    data: Sequence[_Object]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


def page_response(objects: Sequence[_Object], request: Request, *, default: int, most: int) -> Page[_Object]:
    """The page that the query's `limit` and `after` name. Raises RempartError INVALID_REQUEST."""
    size = check_page_size(_limit(request), default=default, most=most)
    after = request.query_params.get("after", "")
    data, has_more = page_of(objects, [each.id for each in objects], after=after, size=size)
    return Page(data, has_more, data[0].id if data else None, data[-1].id if data else None)


def _limit(request: Request) -> int | None:
    text = request.query_params.get("limit")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RempartError(ErrorKind.INVALID_REQUEST, "'limit' must be a number.", param="limit")
    return int(text)
