"""Around every HTTP request: its id, its duration, who asks, and what becomes of a body that nobody reads."""

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.openai_errors import error_response
from rempart_platform.apis.services import Authenticator, bearer_token
from rempart_platform.errors import RempartError
from rempart_platform.validation import client_label, mint_request_id


class Envelope:
    """Gives each request an id of ours in `scope["state"]` and says it in the response, with the time it took.

    What the client calls it, by `x-request-id` or OpenAI's `x-client-request-id`, is kept and said beside it.
    """

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = mint_request_id()
        asked = Headers(scope=scope)
        client_request_id = client_label(asked.get("x-client-request-id") or asked.get("x-request-id"))
        scope.setdefault("state", {}).update(request_id=request_id, client_request_id=client_request_id)
        clock = asyncio.get_running_loop().time
        started = clock()
        body = _Body(asked, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                said = {"x-request-id": request_id, "openai-processing-ms": str(round((clock() - started) * 1000))}
                if client_request_id:
                    said["x-client-request-id"] = client_request_id
                if not await body.discard(self._limits):
                    said["connection"] = "close"
                message["headers"] = [*message.get("headers", ()), *Headers(said).raw]
            await send(message)

        await self._app(scope, body.receive, send_with_headers)


class _Body:
    """Knows whether a request's body has been read to its end."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self._receive = receive
        self._is_read = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        # Such a client sends its body only when asked to, and we no longer ask.
        self._is_waiting = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        self._is_waiting = False
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._is_read = True
        return message

    async def discard(self, limits: HttpLimits) -> bool:
        """Reads what is left, if it is little and comes soon: a client still sending would not see our answer."""
        if self._is_read or self._is_waiting:
            return self._is_read
        num_bytes = 0
        try:
            async with asyncio.timeout(limits.discard_timeout_s):
                while num_bytes <= limits.max_body_bytes:
                    message = await self.receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return True
                    num_bytes += len(message.get("body", b""))
        except TimeoutError:
            return False
        return False


class Authentication:
    """Nothing below is reached without a valid key, but the named paths. The caller is in `scope["state"]`."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, public_paths: Collection[str]) -> None:
        self._app = app
        self._authenticator = authenticator
        self._public_paths = frozenset(public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._public_paths:
            try:
                bearer = bearer_token(Headers(scope=scope).get("authorization"))
                scope["state"]["caller"] = await self._authenticator.authenticate(bearer)
            except RempartError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
