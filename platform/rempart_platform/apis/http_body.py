"""Read a request's body within limits of size, time and rate."""

import asyncio
from collections.abc import Mapping

from starlette.types import Receive

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.errors import ErrorKind, RempartError


async def read_json_body(headers: Mapping[str, str], receive: Receive, limits: HttpLimits) -> bytes:
    """The body of a request that says it is JSON.

    Raises:
        RempartError: INVALID_REQUEST, REQUEST_TOO_LARGE, REQUEST_TIMEOUT, or CLIENT_CLOSED.
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RempartError(ErrorKind.INVALID_REQUEST, "The header 'content-type' must be 'application/json'.")
    # The header is the parser's word: it has refused any that is no number.
    if int(headers.get("content-length", "0")) > limits.max_body_bytes:
        raise _too_large(limits)
    return await _read(receive, limits)


async def _read(receive: Receive, limits: HttpLimits) -> bytes:
    clock = asyncio.get_running_loop().time
    started = clock()
    body = bytearray()
    while True:
        lag_ends = started + limits.body_grace_s + len(body) / limits.min_body_bytes_per_s
        try:
            async with asyncio.timeout_at(min(started + limits.body_timeout_s, lag_ends)):
                message = await receive()
        except TimeoutError:
            raise RempartError(ErrorKind.REQUEST_TIMEOUT, "The request's body took too long.") from None
        if message["type"] == "http.disconnect":
            raise RempartError(ErrorKind.CLIENT_CLOSED, "The client closed the connection.")
        body += message.get("body", b"")
        if len(body) > limits.max_body_bytes:
            raise _too_large(limits)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(limits: HttpLimits) -> RempartError:
    message = f"The request's body is too large; at most {limits.max_body_bytes} bytes are allowed."
    return RempartError(ErrorKind.REQUEST_TOO_LARGE, message)
