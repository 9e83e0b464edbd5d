"""Chat and text completions: a body in, an answer or a stream of events out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rempart_platform import validation
from rempart_platform.apis.echo import echo_deltas
from rempart_platform.apis.http_body import read_json_body
from rempart_platform.apis.http_connection import EventStream, run_while_connected
from rempart_platform.apis.openai_chat_render import ChatRenderer
from rempart_platform.apis.openai_completion_render import CompletionRenderer
from rempart_platform.apis.openai_decode import decode_body
from rempart_platform.apis.openai_errors import error_event, error_response
from rempart_platform.apis.openai_objects import DONE, RenderContext, Renderer
from rempart_platform.apis.openai_schema import ChatBody, CompletionBody, chat_request, complete_request
from rempart_platform.apis.services import ApiServices
from rempart_platform.errors import RempartError
from rempart_platform.generation import Delta, GenerationEvent, GenerationRequest
from rempart_platform.validation import Arrival


@dataclass(frozen=True, slots=True)
class Prepared:
    """A valid request and how its answer looks. `preface` is said before the model's own output."""

    request: GenerationRequest
    renderer: Renderer
    is_stream: bool
    preface: tuple[Delta, ...] = ()


class Prepare(Protocol):
    """A request body to a valid request. Raises RempartError."""

    async def __call__(self, body: bytes, services: ApiServices, arrival: Arrival) -> Prepared: ...


async def prepare_chat(body: bytes, services: ApiServices, arrival: Arrival) -> Prepared:
    """POST /v1/chat/completions."""
    parsed = decode_body(body, ChatBody, services.http)
    message = chat_request(parsed)
    model = services.catalog.get(message.model, arrival.session(message.options))
    request = await validation.chat(message, model, services.limits, arrival, is_whole=not parsed.stream)
    context = RenderContext.of(request, model, include_usage=parsed.include_usage)
    return Prepared(request, ChatRenderer(context), bool(parsed.stream))


async def prepare_completion(body: bytes, services: ApiServices, arrival: Arrival) -> Prepared:
    """POST /v1/completions."""
    parsed = decode_body(body, CompletionBody, services.http)
    message = complete_request(parsed)
    model = services.catalog.get(message.model, arrival.session(message.options))
    request = await validation.complete(message, model, services.limits, arrival, is_whole=not parsed.stream)
    context = RenderContext.of(request, model, include_usage=parsed.include_usage)
    return Prepared(request, CompletionRenderer(context), bool(parsed.stream), echo_deltas(message, request, model))


class GenerationEndpoint:
    """An ASGI endpoint. A client that goes away at any time ends its generation."""

    def __init__(self, services: ApiServices, prepare: Prepare) -> None:
        self._services = services
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(Headers(scope=scope), receive, self._services.http)
        arrival = Arrival(
            request_id=scope["state"]["request_id"],
            caller=scope["state"]["caller"],
            created_s=int(self._services.clock()),
            seed=validation.mint_seed(),
            client_request_id=scope["state"]["client_request_id"],
        )
        prepared = await self._prepare(body, self._services, arrival)
        if prepared.is_stream:
            stream = EventStream(send, self._services.http.keepalive_s)
            work = self._stream(prepared, stream, _Exchange(scope, receive, send))
            await run_while_connected(receive, work, stream.keep_alive())
        else:
            await run_while_connected(receive, self._answer(prepared, _Exchange(scope, receive, send)))

    async def _answer(self, prepared: Prepared, exchange: "_Exchange") -> None:
        try:
            async with self._services.dispatcher.admit(prepared.request) as generation:
                events = [event async for event in with_preface(prepared, generation.events())]
                headers = dict(generation.headers)
        except RempartError as error:
            await exchange.respond(error_response(error))
            return
        content = prepared.renderer.body(events)
        await exchange.respond(Response(content, headers=headers, media_type="application/json"))

    async def _stream(self, prepared: Prepared, stream: EventStream, exchange: "_Exchange") -> None:
        try:
            async with self._services.dispatcher.admit(prepared.request) as generation:
                stream.open(generation.headers)
                async for event in with_preface(prepared, generation.events()):
                    chunk = prepared.renderer.chunk(event)
                    if chunk:
                        await stream.write(chunk)
        except RempartError as error:
            if stream.is_started:
                await stream.write(error_event(error), is_last=True)
            else:
                await exchange.respond(error_response(error))
            return
        await stream.write(DONE, is_last=True)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One HTTP request whose answer is still to be given."""

    scope: Scope
    receive: Receive
    send: Send

    async def respond(self, response: Response) -> None:
        await response(self.scope, self.receive, self.send)


def with_preface(prepared: Prepared, events: AsyncIterator[GenerationEvent]) -> AsyncIterator[GenerationEvent]:
    """The preface comes with the first event: until then, the request may still fail with a status of its own."""
    return _begun_by(prepared.preface, events) if prepared.preface else events


async def _begun_by(
    preface: tuple[Delta, ...], events: AsyncIterator[GenerationEvent]
) -> AsyncIterator[GenerationEvent]:
    async for event in events:
        for delta in preface:
            yield delta
        preface = ()
        yield event
