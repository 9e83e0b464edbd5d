"""Read a request's body within limits of size, time and rate."""

from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.pace import Pace, PacedClient
from rempart_platform.errors import ErrorKind, RempartError


async def read_json_body(headers: Mapping[str, str], receive: Receive, limits: HttpLimits) -> bytes:
    """The body of a request that says it is JSON.

    Raises:
        RempartError: INVALID_REQUEST, REQUEST_TOO_LARGE, REQUEST_TIMEOUT, or CLIENT_CLOSED.
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RempartError(ErrorKind.INVALID_REQUEST, "The header 'content-type' must be 'application/json'.")
    if announced_length(headers) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    async for piece in body_pieces(receive, limits.body_pace):
        body += piece
        if len(body) > limits.max_body_bytes:
            raise _too_large(limits)
    return bytes(body)


async def body_pieces(receive: Receive, pace: Pace) -> AsyncIterator[bytes]:
    """A body as it comes, however large.

    Raises:
        RempartError: REQUEST_TIMEOUT or CLIENT_CLOSED.
    """
    client = PacedClient(pace)
    has_more = True
    while has_more:
        message = await client.wait_for(receive())
        if message["type"] == "http.disconnect":
            raise RempartError(ErrorKind.CLIENT_CLOSED, "The client closed the connection.")
        piece = message.get("body", b"")
        client.count(len(piece))
        yield piece
        has_more = message.get("more_body", False)


def announced_length(headers: Mapping[str, str]) -> int:
    """Bytes of the body as its sender says, 0 when it does not. It is a number: the parser has refused all others."""
    return int(headers.get("content-length", "0"))


def _too_large(limits: HttpLimits) -> RempartError:
    message = f"The request's body has more than {limits.max_body_bytes} bytes (limit max_body_bytes)."
    return RempartError(ErrorKind.REQUEST_TOO_LARGE, message)
