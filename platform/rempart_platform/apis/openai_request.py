"""What routes take from a request and answer it with."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rempart_platform.generation import Caller


def caller_of(request: Request) -> Caller:
    """Who asks, as `http_envelope.Authentication` found out."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def json_response(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
