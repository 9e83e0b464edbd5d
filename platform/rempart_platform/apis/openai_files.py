"""/v1/files: a tenant's files, in and out in pieces."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Final
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rempart_platform.apis import batch_rules
from rempart_platform.apis.http_body import announced_length, body_pieces
from rempart_platform.apis.http_connection import run_while_connected
from rempart_platform.apis.openai_request import Page, caller_of, json_response, limit_of, parse_number
from rempart_platform.apis.services import ApiServices
from rempart_platform.apis.upload_form import UploadForm
from rempart_platform.batch.values import BatchLimits, StoredFile, file_too_large
from rempart_platform.errors import invalid_request

_ANCHOR: Final = "expires_after[anchor]"
_SECONDS: Final = "expires_after[seconds]"
_FIELDS: Final = frozenset({"purpose", _ANCHOR, _SECONDS})
_ORDERS: Final = ("asc", "desc")


class FileObject(msgspec.Struct):
    id: str
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"
    status_details: str | None = None

    @classmethod
    def of(cls, file: StoredFile) -> "FileObject":
        expires_s = file.expires_s or None
        return cls(file.file_id, file.num_bytes, file.created_s, expires_s, file.filename, file.purpose)


class DeletedFile(msgspec.Struct):
    id: str
    deleted: bool = True
    object: str = "file"


class FileRoutes:
    """What can be asked of files over HTTP."""

    def __init__(self, services: ApiServices) -> None:
        self._services = services

    def all(self) -> list[Route]:
        return [
            Route("/v1/files", self._files, methods=["GET", "POST"]),
            Route("/v1/files/{file_id}", self._file, methods=["GET", "DELETE"]),
            Route("/v1/files/{file_id}/content", self._content),
        ]

    async def _files(self, request: Request) -> Response:
        return await (self._upload(request) if request.method == "POST" else self._list(request))

    async def _file(self, request: Request) -> Response:
        files = batch_rules.files_of(self._services)
        tenant, file_id = caller_of(request).tenant, _file_id(request)
        if request.method == "DELETE":
            await files.delete(tenant, file_id)
            return json_response(DeletedFile(file_id))
        return json_response(FileObject.of(await files.get(tenant, file_id)))

    async def _upload(self, request: Request) -> Response:
        files = batch_rules.files_of(self._services)
        http, limits = self._services.http, self._services.batch_limits
        # What surrounds the file is little, but not nothing.
        most = limits.max_file_bytes + http.max_form_parts * (http.max_part_head_bytes + http.max_field_bytes)
        if announced_length(request.headers) > most:
            raise file_too_large(limits)
        pieces = _at_most(most, body_pieces(request.receive, http.upload_pace), limits)
        form = UploadForm(pieces, request.headers.get("content-type", ""), http, _FIELDS)
        filename = batch_rules.check_filename(await form.find_file(), param="file")
        purpose = batch_rules.check_purpose(form.fields.get("purpose", batch_rules.PURPOSE))

        async def content() -> AsyncIterator[bytes]:
            async for piece in form.content():
                yield piece
            # Fields may stand behind the file; nothing is kept of one for which they are not what they must be.
            _lifetime_s(form, limits)
            batch_rules.check_purpose(form.fields.get("purpose"))

        file = await files.create(
            caller_of(request).tenant, filename, purpose, content(), lifetime_s=lambda: _lifetime_s(form, limits)
        )
        return json_response(FileObject.of(file))

    async def _list(self, request: Request) -> Response:
        files = batch_rules.files_of(self._services)
        order = request.query_params.get("order", "desc")
        if order not in _ORDERS:
            raise invalid_request("'order' must be 'asc' or 'desc'.", "order")
        size = batch_rules.check_files_per_page(limit_of(request))
        found = await files.list(caller_of(request).tenant, purpose=request.query_params.get("purpose", ""))
        if order == "asc":
            found = found[::-1]
        page, has_more = batch_rules.page_of(found, after=request.query_params.get("after", ""), size=size)
        return json_response(Page.of([FileObject.of(file) for file in page], has_more=has_more))

    async def _content(self, request: Request) -> Response:
        files = batch_rules.files_of(self._services)
        file = await files.get(caller_of(request).tenant, _file_id(request))
        headers = {
            "content-length": str(file.num_bytes),
            "content-disposition": f"attachment; filename*=utf-8''{quote(file.filename, safe='')}",
            "x-content-type-options": "nosniff",
        }
        if request.method == "HEAD":
            return Response(headers=headers, media_type=_ContentResponse.media_type)
        pieces = files.read(file)
        first = await anext(pieces, b"")  # until it is here, a failure can still have a status of its own
        return _ContentResponse(first, pieces, headers)


def _lifetime_s(form: UploadForm, limits: BatchLimits) -> int | None:
    anchor, seconds = form.fields.get(_ANCHOR), form.fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise invalid_request(f"'{_ANCHOR}' must be 'created_at'.", _ANCHOR)
    return batch_rules.check_lifetime_s(parse_number(seconds or "", _SECONDS), limits, param=_SECONDS)


async def _at_most(most: int, pieces: AsyncIterator[bytes], limits: BatchLimits) -> AsyncIterator[bytes]:
    num_bytes = 0
    async for piece in pieces:
        num_bytes += len(piece)
        if num_bytes > most:
            raise file_too_large(limits)
        yield piece


class _ContentResponse(Response):
    """A file's content. A client that goes away ends the reading of it."""

    media_type = "application/octet-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers=headers)
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        # Each piece waits for the next one: a client that has all bytes may send its next request, so the last byte
        # must be the end of the response.
        last = self._first
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._rest:
                await send({"type": "http.response.body", "body": last, "more_body": True})
                last = piece
        await send({"type": "http.response.body", "body": last})


def _file_id(request: Request) -> str:
    return batch_rules.check_file_id(request.path_params["file_id"])
