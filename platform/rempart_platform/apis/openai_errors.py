"""Errors as OpenAI's clients read them: nested, all four keys, always a string code."""

import math

import msgspec
from starlette.responses import Response

from rempart_platform.errors import ErrorKind, RempartError


class _Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class _ErrorBody(msgspec.Struct):
    error: _Error


def error_body(error: RempartError) -> bytes:
    """The JSON of an error."""
    answer = error.answer
    return msgspec.json.encode(_ErrorBody(_Error(error.message, answer.openai_type, error.param, answer.openai_code)))


def error_event(error: RempartError) -> bytes:
    """An error in the middle of a stream: it ends the stream, without [DONE]."""
    return b"data: " + error_body(error) + b"\n\n"


def error_headers(error: RempartError) -> dict[str, str]:
    """Headers beside the body: the error's own, the true wait, and how to authenticate."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 0))
        headers["retry-after-ms"] = str(max(math.ceil(error.retry_after_s * 1000), 0))
    if error.kind is ErrorKind.INVALID_API_KEY:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: RempartError) -> Response:
    """The whole answer."""
    return Response(error_body(error), error.answer.http_status, error_headers(error), "application/json")
