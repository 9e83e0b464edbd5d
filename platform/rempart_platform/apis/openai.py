"""The OpenAI API over HTTP: routes, authentication and error answers.

    connection (http_limits) ─► Envelope ─► Authentication ─► route ─► body ─► validation ─► dispatcher ─► render

Every route but the health checks needs a key, and so does everything that is no route.
"""

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rempart_platform import validation
from rempart_platform.apis.http_body import read_json_body
from rempart_platform.apis.http_envelope import Authentication, Envelope
from rempart_platform.apis.openai_batches import BatchRoutes
from rempart_platform.apis.openai_decode import decode_body
from rempart_platform.apis.openai_errors import error_response
from rempart_platform.apis.openai_files import FileRoutes
from rempart_platform.apis.openai_generation import GenerationEndpoint, prepare_chat, prepare_completion
from rempart_platform.apis.openai_request import json_response
from rempart_platform.apis.openai_schema import TokenizeBody, tokenize_request
from rempart_platform.apis.services import ApiServices
from rempart_platform.errors import ErrorKind, RempartError, internal_error
from rempart_platform.models import ServedModel

PUBLIC_PATHS = ("/health", "/livez", "/readyz")


class ModelObject(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "rempart"


class ModelList(msgspec.Struct):
    data: list[ModelObject]
    object: str = "list"


class Tokens(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int
    model: str
    """Whose tokens these are; under an alias, one of its models."""


def build_app(services: ApiServices) -> ASGIApp:
    """The ASGI application; serve it with `http_server.HttpServer`."""
    app = Starlette(
        routes=build_routes(services),
        middleware=[
            Middleware(Authentication, authenticator=services.authenticator, public_paths=PUBLIC_PATHS),
        ],
        exception_handlers={RempartError: _answer, HTTPException: _answer_http, Exception: _answer_unexpected},
    )
    app.router.redirect_slashes = False
    return Envelope(app, services.http)


def build_routes(services: ApiServices) -> list[Route]:
    """All there is."""
    models = _Models(services)
    health = _Health(services)
    return [  # in the order in which they are tried
        Route("/v1/chat/completions", GenerationEndpoint(services, prepare_chat), methods=["POST"]),
        Route("/v1/completions", GenerationEndpoint(services, prepare_completion), methods=["POST"]),
        Route("/health", health.ready),
        Route("/readyz", health.ready),
        Route("/livez", health.live),
        Route("/v1/models", models.list),
        Route("/v1/models/{name:path}", models.get),
        Route("/tokenize", _Tokenize(services), methods=["POST"]),
        *FileRoutes(services).all(),
        *BatchRoutes(services).all(),
    ]


class _Health:
    def __init__(self, services: ApiServices) -> None:
        self._services = services

    async def live(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        if not self._services.is_ready():
            raise RempartError(ErrorKind.UNAVAILABLE, "No engine is ready.")
        return json_response({"status": "ok"})


class _Models:
    def __init__(self, services: ApiServices) -> None:
        self._catalog = services.catalog

    async def list(self, _: Request) -> Response:
        return json_response(ModelList([_model_object(model) for model in self._catalog.listed()]))

    async def get(self, request: Request) -> Response:
        return json_response(_model_object(self._catalog.shown(request.path_params["name"])))


class _Tokenize:
    """Under an alias, the model that tokenizes is the one that a chat with the same `prompt_cache_key` or `user` would
    meet; with neither, the one of the greatest weight."""

    def __init__(self, services: ApiServices) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        body = decode_body(
            await read_json_body(Headers(scope=scope), receive, services.http), TokenizeBody, services.http
        )
        request = tokenize_request(body)
        model = services.catalog.get(body.model, validation.session_of(scope["state"]["caller"], request))
        token_ids = await validation.tokenize(request, model, services.limits)
        response = json_response(Tokens(token_ids, len(token_ids), model.max_model_len, model.name))
        await response(scope, receive, send)


def _model_object(model: ServedModel) -> ModelObject:
    return ModelObject(model.name, model.created_s, model.max_model_len)


async def _answer(_: Request, error: Exception) -> Response:
    assert isinstance(error, RempartError)
    return error_response(error)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or not this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == ErrorKind.METHOD_NOT_ALLOWED.value.http_status:
        message = f"{request.method} is not allowed on this path."
        answer = RempartError(ErrorKind.METHOD_NOT_ALLOWED, message)
        answer.headers.update(error.headers or {})
        return error_response(answer)
    return error_response(RempartError(ErrorKind.NOT_FOUND, "There is no such path."))


async def _answer_unexpected(_: Request, __: Exception) -> Response:
    """The server logs the exception; the caller learns nothing of it but the request's id, in the headers."""
    return error_response(internal_error())
