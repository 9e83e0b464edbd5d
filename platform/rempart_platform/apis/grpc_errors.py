"""Errors as gRPC clients read them: google.rpc.Status with details in grpc-status-details-bin."""

import math

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # the package ships no types

from rempart_platform.errors import RempartError

DOMAIN = "rempart"
GRPC_DETAILS_METADATA_KEY = "grpc-status-details-bin"


def rich_status(error: RempartError) -> status_pb2.Status:
    """ErrorInfo (its reason is the OpenAI code) always; RetryInfo, QuotaFailure, BadRequest where they apply."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.answer.openai_code, domain=DOMAIN)]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(math.ceil(max(error.retry_after_s, 0.0) * 1e9))
        details.append(retry)
    if error.violation is not None:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.violation.subject,
            description=error.message,
            quota_metric=error.violation.metric,
            quota_value=error.violation.limit,
            quota_dimensions=error.violation.dimensions,
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if error.param is not None:
        field = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[field]))
    status = status_pb2.Status(code=error.answer.grpc_code.value[0], message=error.message)
    status.details.extend(_packed(detail) for detail in details)
    return status


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


class _Status(grpc.Status):
    def __init__(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


def error_status(error: RempartError) -> grpc.Status:
    """For `context.abort_with_status`: code, message, rich details; the error's own headers as metadata."""
    details = (GRPC_DETAILS_METADATA_KEY, rich_status(error).SerializeToString())
    return _Status(error.answer.grpc_code, error.message, (details, *error.headers.items()))
