"""What the front ends need of the rest of the router."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.batch.values import Batches, BatchLimits, Files
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, GenerationEvent, GenerationRequest
from rempart_platform.models import ModelCatalog
from rempart_platform.request_limits import RequestLimits


class Authenticator(Protocol):
    """API key → caller."""

    async def authenticate(self, bearer: str) -> Caller:
        """The caller of a key, given without "Bearer ". Raises RempartError INVALID_API_KEY."""
        ...


class AdminAuthenticator(Protocol):
    """Operators, for the Admin service."""

    async def authenticate(self, bearer: str) -> str:
        """Who asks, for the audit log. Raises RempartError INVALID_API_KEY."""
        ...


class Generation(Protocol):
    """An admitted request."""

    @property
    def headers(self) -> Mapping[str, str]:
        """x-ratelimit-*, for the response."""
        ...

    def events(self) -> AsyncIterator[GenerationEvent]:
        """Deltas, Finished of every choice, Usage last. Raises RempartError when it cannot go on."""
        ...


class Dispatcher(Protocol):
    """Runs valid requests."""

    def admit(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Admits a request, or raises RempartError on entry; leaving the block ends it."""
        ...


@dataclass(frozen=True, slots=True)
class ApiServices:
    """Handed to every front end. `clock` is seconds since the epoch; `is_ready` says whether requests can be served."""

    authenticator: Authenticator
    catalog: ModelCatalog
    dispatcher: Dispatcher
    limits: RequestLimits = field(default_factory=RequestLimits)
    http: HttpLimits = field(default_factory=HttpLimits)
    clock: Callable[[], float] = time.time
    is_ready: Callable[[], bool] = lambda: True
    files: Files | None = None
    """None, as `batches` then is, when the operator has configured no storage for batch jobs."""
    batches: Batches | None = None
    batch_limits: BatchLimits = BatchLimits()


def bearer_token(authorization: str | None) -> str:
    """The key of an authorization header. Raises RempartError INVALID_API_KEY when there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise RempartError(ErrorKind.INVALID_API_KEY, "No key was given; send it as 'Authorization: Bearer KEY'.")
    return token.strip()
