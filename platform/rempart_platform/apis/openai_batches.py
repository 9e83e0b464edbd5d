"""/v1/batches: a tenant's batch jobs."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rempart_platform.apis import batch_rules
from rempart_platform.apis.http_body import read_json_body
from rempart_platform.apis.openai_decode import decode_body
from rempart_platform.apis.openai_request import Page, caller_of, json_response, limit_of
from rempart_platform.apis.services import ApiServices
from rempart_platform.batch.values import Batch, InputError, LineCounts


class ExpiresAfter(msgspec.Struct):
    anchor: Literal["created_at"]
    seconds: int


class CreateBatchBody(msgspec.Struct):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchErrorObject(msgspec.Struct):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(msgspec.Struct):
    data: Sequence[BatchErrorObject]
    object: str = "list"

    @classmethod
    def of(cls, errors: Sequence[InputError]) -> "BatchErrors | None":
        if not errors:
            return None
        return cls([BatchErrorObject(each.code, each.line, each.message, each.param) for each in errors])


class RequestCounts(msgspec.Struct):
    completed: int
    failed: int
    total: int

    @classmethod
    def of(cls, counts: LineCounts) -> "RequestCounts":
        return cls(counts.completed, counts.failed, counts.total)


class BatchObject(msgspec.Struct):
    id: str
    completion_window: str
    created_at: int
    endpoint: str
    input_file_id: str
    status: str
    cancelled_at: int | None
    cancelling_at: int | None
    completed_at: int | None
    error_file_id: str | None
    errors: BatchErrors | None
    expired_at: int | None
    expires_at: int
    failed_at: int | None
    finalizing_at: int | None
    in_progress_at: int | None
    metadata: Mapping[str, str] | None
    model: str | None
    output_file_id: str | None
    request_counts: RequestCounts
    usage: None = None
    object: str = "batch"

    @classmethod
    def of(cls, batch: Batch) -> "BatchObject":
        return cls(
            id=batch.batch_id,
            completion_window=batch_rules.window_text(batch.completion_window_s),
            created_at=batch.created_s,
            endpoint=batch.endpoint,
            input_file_id=batch.input_file_id,
            status=batch.status.value,
            cancelled_at=batch.cancelled_s,
            cancelling_at=batch.cancelling_s,
            completed_at=batch.completed_s,
            error_file_id=batch.error_file_id or None,
            errors=BatchErrors.of(batch.errors),
            expired_at=batch.expired_s,
            expires_at=batch.expires_s,
            failed_at=batch.failed_s,
            finalizing_at=batch.finalizing_s,
            in_progress_at=batch.in_progress_s,
            metadata=dict(batch.metadata) or None,
            model=batch.model or None,
            output_file_id=batch.output_file_id or None,
            request_counts=RequestCounts.of(batch.counts),
        )


class BatchRoutes:
    """What can be asked of batches over HTTP."""

    def __init__(self, services: ApiServices) -> None:
        self._services = services

    def all(self) -> list[Route]:
        return [
            Route("/v1/batches", self._batches, methods=["GET", "POST"]),
            Route("/v1/batches/{batch_id}", self._get),
            Route("/v1/batches/{batch_id}/cancel", self._cancel, methods=["POST"]),
        ]

    async def _batches(self, request: Request) -> Response:
        return await (self._create(request) if request.method == "POST" else self._list(request))

    async def _create(self, request: Request) -> Response:
        batches = batch_rules.batches_of(self._services)
        http = self._services.http
        body = decode_body(await read_json_body(request.headers, request.receive, http), CreateBatchBody, http)
        batch = await batches.create(
            caller_of(request),
            endpoint=batch_rules.check_endpoint(body.endpoint),
            completion_window_s=batch_rules.parse_window_s(body.completion_window, self._services.batch_limits),
            metadata=batch_rules.check_metadata(body.metadata or {}),
            input_file_id=batch_rules.check_file_id(body.input_file_id),
            output_lifetime_s=self._lifetime_s(body.output_expires_after),
        )
        return json_response(BatchObject.of(batch))

    def _lifetime_s(self, asked: ExpiresAfter | None) -> int | None:
        if asked is None:
            return None
        return batch_rules.check_lifetime_s(asked.seconds, self._services.batch_limits, param="output_expires_after")

    async def _list(self, request: Request) -> Response:
        batches = batch_rules.batches_of(self._services)
        size = batch_rules.check_batches_per_page(limit_of(request))
        after = request.query_params.get("after", "")
        page, has_more = await batches.list(caller_of(request).tenant, limit=size, after=after)
        return json_response(Page.of([BatchObject.of(batch) for batch in page], has_more=has_more))

    async def _get(self, request: Request) -> Response:
        batches = batch_rules.batches_of(self._services)
        return json_response(BatchObject.of(await batches.get(caller_of(request).tenant, _batch_id(request))))

    async def _cancel(self, request: Request) -> Response:
        batches = batch_rules.batches_of(self._services)
        return json_response(BatchObject.of(await batches.cancel(caller_of(request).tenant, _batch_id(request))))


def _batch_id(request: Request) -> str:
    return batch_rules.check_batch_id(request.path_params["batch_id"])
