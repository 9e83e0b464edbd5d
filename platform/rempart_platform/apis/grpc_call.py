"""What every call of a tenant over gRPC goes through: who asks, how it fails, and how long it may be slow."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from rempart_platform.apis.grpc_errors import error_status
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.services import Authenticator, bearer_token
from rempart_platform.errors import ErrorKind, RempartError, internal_error
from rempart_platform.generation import Caller

_logger = logging.getLogger(__name__)

# Any: one context type serves methods of all message types.
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")


async def answer(
    authenticator: Authenticator,
    context: Context,
    serve: Callable[[Caller], Awaitable[_T]],
    before_refusal: Callable[[], Awaitable[None]] | None = None,
) -> _T:
    """Authenticates, serves, and turns whatever goes wrong into the call's status."""
    try:
        caller = await authenticator.authenticate(bearer_token(metadata_of(context, "authorization")))
        return await serve(caller)
    except RempartError as error:
        failure = error
    except Exception:
        _logger.exception("a call failed unexpectedly")
        failure = internal_error()
    if before_refusal is not None:
        await before_refusal()
    return await context.abort_with_status(error_status(failure))


async def write(context: Context, message: Message, limits: GrpcLimits) -> None:
    """Sends one message of a stream. Raises RempartError CLIENT_CLOSED when the client does not read it in time."""
    try:
        async with asyncio.timeout(limits.write_timeout_s):
            await context.write(message)
    except TimeoutError:
        raise RempartError(ErrorKind.CLIENT_CLOSED, "The client reads too slowly.") from None


def metadata_of(context: Context, key: str) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value
    return None
