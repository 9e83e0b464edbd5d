"""Every error is an answer: one table from our errors to gRPC codes, HTTP statuses and OpenAI bodies.

    RempartError ── ErrorKind ──► grpc.StatusCode (+ RetryInfo, QuotaFailure, ErrorInfo)
                              └─► HTTP status, OpenAI `type` and `code`, Retry-After

The message is for the caller: it names the limit or the field, never an address, a path or an exception of ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import grpc


@dataclass(frozen=True, slots=True)
class _Answer:
    grpc_code: grpc.StatusCode
    http_status: int
    openai_type: str
    openai_code: str
    is_retryable: bool


class ErrorKind(Enum):
    """What went wrong, with what is answered for it."""

    INVALID_REQUEST = _Answer(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", "invalid_value", False)
    CONTEXT_LENGTH_EXCEEDED = _Answer(
        grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", "context_length_exceeded", False
    )
    INVALID_API_KEY = _Answer(grpc.StatusCode.UNAUTHENTICATED, 401, "invalid_request_error", "invalid_api_key", False)
    PERMISSION_DENIED = _Answer(
        grpc.StatusCode.PERMISSION_DENIED, 403, "invalid_request_error", "permission_denied", False
    )
    MODEL_NOT_FOUND = _Answer(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "model_not_found", False)
    NOT_FOUND = _Answer(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "not_found", False)
    METHOD_NOT_ALLOWED = _Answer(
        grpc.StatusCode.UNIMPLEMENTED, 405, "invalid_request_error", "method_not_allowed", False
    )
    REQUEST_TIMEOUT = _Answer(grpc.StatusCode.DEADLINE_EXCEEDED, 408, "invalid_request_error", "request_timeout", False)
    ALREADY_EXISTS = _Answer(grpc.StatusCode.ALREADY_EXISTS, 409, "invalid_request_error", "already_exists", False)
    REQUEST_TOO_LARGE = _Answer(
        grpc.StatusCode.INVALID_ARGUMENT, 413, "invalid_request_error", "request_too_large", False
    )
    RATE_LIMIT_EXCEEDED = _Answer(
        grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded", True
    )
    CLIENT_CLOSED = _Answer(grpc.StatusCode.CANCELLED, 499, "invalid_request_error", "client_closed_request", False)
    INTERNAL = _Answer(grpc.StatusCode.INTERNAL, 500, "server_error", "internal_error", True)
    UNAVAILABLE = _Answer(grpc.StatusCode.UNAVAILABLE, 503, "server_error", "service_unavailable", True)
    DEADLINE_EXCEEDED = _Answer(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "server_error", "deadline_exceeded", True)


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """Which limit refused: `subject` is the tenant, `metric` is "requests", "tokens", "concurrency" and so on.

    `dimensions` names the model or the key whose limit it is; empty for the tenant's own. Money is in billionths.
    """

    subject: str
    metric: str
    limit: int
    dimensions: Mapping[str, str] = field(default_factory=dict)


class RempartError(Exception):
    """An answer other than success.

    Args:
        kind: what went wrong.
        message: for the caller.
        param: the request field at fault, as the caller wrote it.
        retry_after_s: true wait before the same request can succeed, seconds.
        violation: the limit that refused.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        violation: QuotaViolation | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.violation = violation
        self.headers: dict[str, str] = {}
        """Extra HTTP headers / gRPC trailing metadata (x-ratelimit-*)."""

    @property
    def answer(self) -> _Answer:
        return self.kind.value


class EngineLostError(RempartError):
    """UNAVAILABLE: an engine went away with the request, which may be what ended it."""


def invalid_request(message: str, param: str | None = None) -> RempartError:
    """The caller's own mistake, in the field `param`."""
    return RempartError(ErrorKind.INVALID_REQUEST, message, param=param)


def internal_error() -> RempartError:
    """A mistake of ours, of which the caller is told no more."""
    return RempartError(ErrorKind.INTERNAL, "The server had an error while processing the request.")
