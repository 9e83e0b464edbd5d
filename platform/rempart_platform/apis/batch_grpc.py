# ruff: noqa: N802 - gRPC names methods as the proto does
"""The `Batches` service over gRPC: files in and out, batch jobs. Its rules are those of the OpenAI API."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Literal, TypeVar

from rempart_platform.apis import batch_rules
from rempart_platform.apis.batch_messages import batch_message, file_message
from rempart_platform.apis.grpc_call import Context, answer, write
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.grpc_upload import Upload
from rempart_platform.apis.services import ApiServices
from rempart_platform.generation import Caller
from rempart_protos.v1 import batch_pb2, batch_pb2_grpc

_T = TypeVar("_T")


class BatchesServicer(batch_pb2_grpc.BatchesServicer):
    """Every method needs a key."""

    def __init__(self, services: ApiServices, limits: GrpcLimits | None = None) -> None:
        self._services = services
        self._limits = limits or GrpcLimits()

    async def UploadFile(
        self, request_iterator: AsyncIterator[batch_pb2.UploadFileRequest], context: Context
    ) -> batch_pb2.StoredFile:
        http = self._services.http
        upload = Upload(request_iterator, http.upload_pace)

        async def serve(caller: Caller) -> batch_pb2.StoredFile:
            files = batch_rules.files_of(self._services)
            said = await upload.metadata()
            lifetime_s = self._lifetime_s(said, "lifetime_s")
            file = await files.create(
                caller.tenant,
                batch_rules.check_filename(said.filename, param="filename"),
                batch_rules.check_purpose(said.purpose),
                upload.content(),
                lifetime_s=lambda: lifetime_s,
            )
            return file_message(file)

        return await self._answer(context, serve, lambda: upload.discard(http.discard_timeout_s))

    async def GetFile(self, request: batch_pb2.GetFileRequest, context: Context) -> batch_pb2.StoredFile:
        async def serve(caller: Caller) -> batch_pb2.StoredFile:
            files = batch_rules.files_of(self._services)
            return file_message(await files.get(caller.tenant, batch_rules.check_file_id(request.file_id)))

        return await self._answer(context, serve)

    async def ListFiles(self, request: batch_pb2.ListFilesRequest, context: Context) -> batch_pb2.ListFilesResponse:
        async def serve(caller: Caller) -> batch_pb2.ListFilesResponse:
            files = batch_rules.files_of(self._services)
            size = batch_rules.check_files_per_page(request.limit if request.HasField("limit") else None)
            found = await files.list(caller.tenant, purpose=request.purpose)
            if request.oldest_first:
                found = found[::-1]
            page, has_more = batch_rules.page_of(found, after=request.after, size=size)
            return batch_pb2.ListFilesResponse(files=map(file_message, page), has_more=has_more)

        return await self._answer(context, serve)

    async def DeleteFile(self, request: batch_pb2.DeleteFileRequest, context: Context) -> batch_pb2.DeleteFileResponse:
        async def serve(caller: Caller) -> batch_pb2.DeleteFileResponse:
            files = batch_rules.files_of(self._services)
            await files.delete(caller.tenant, batch_rules.check_file_id(request.file_id))
            return batch_pb2.DeleteFileResponse()

        return await self._answer(context, serve)

    async def DownloadFile(  # type: ignore[override] # writes to the context, which a slow reader can be held to
        self, request: batch_pb2.DownloadFileRequest, context: Context
    ) -> None:
        async def serve(caller: Caller) -> None:
            files = batch_rules.files_of(self._services)
            file = await files.get(caller.tenant, batch_rules.check_file_id(request.file_id))
            async with aclosing(files.read(file)) as pieces:
                async for piece in pieces:
                    await write(context, batch_pb2.FileChunk(content=piece), self._limits)

        await self._answer(context, serve)

    async def CreateBatch(self, request: batch_pb2.CreateBatchRequest, context: Context) -> batch_pb2.Batch:
        async def serve(caller: Caller) -> batch_pb2.Batch:
            window = request.completion_window or batch_rules.DEFAULT_WINDOW
            batch = await batch_rules.batches_of(self._services).create(
                caller,
                endpoint=batch_rules.check_endpoint(request.endpoint),
                completion_window_s=batch_rules.parse_window_s(window, self._services.batch_limits),
                metadata=batch_rules.check_metadata(dict(request.metadata)),
                input_file_id=batch_rules.check_file_id(request.input_file_id),
                output_lifetime_s=self._lifetime_s(request, "output_lifetime_s"),
            )
            return batch_message(batch)

        return await self._answer(context, serve)

    async def GetBatch(self, request: batch_pb2.GetBatchRequest, context: Context) -> batch_pb2.Batch:
        async def serve(caller: Caller) -> batch_pb2.Batch:
            batches = batch_rules.batches_of(self._services)
            return batch_message(await batches.get(caller.tenant, batch_rules.check_batch_id(request.batch_id)))

        return await self._answer(context, serve)

    async def ListBatches(
        self, request: batch_pb2.ListBatchesRequest, context: Context
    ) -> batch_pb2.ListBatchesResponse:
        async def serve(caller: Caller) -> batch_pb2.ListBatchesResponse:
            batches = batch_rules.batches_of(self._services)
            size = batch_rules.check_batches_per_page(request.limit if request.HasField("limit") else None)
            page, has_more = await batches.list(caller.tenant, limit=size, after=request.after)
            return batch_pb2.ListBatchesResponse(batches=map(batch_message, page), has_more=has_more)

        return await self._answer(context, serve)

    async def CancelBatch(self, request: batch_pb2.CancelBatchRequest, context: Context) -> batch_pb2.Batch:
        async def serve(caller: Caller) -> batch_pb2.Batch:
            batches = batch_rules.batches_of(self._services)
            return batch_message(await batches.cancel(caller.tenant, batch_rules.check_batch_id(request.batch_id)))

        return await self._answer(context, serve)

    def _lifetime_s(
        self,
        message: batch_pb2.FileMetadata | batch_pb2.CreateBatchRequest,
        field: Literal["lifetime_s", "output_lifetime_s"],
    ) -> int | None:
        if not message.HasField(field):
            return None
        return batch_rules.check_lifetime_s(getattr(message, field), self._services.batch_limits, param=field)

    async def _answer(
        self,
        context: Context,
        serve: Callable[[Caller], Awaitable[_T]],
        before_refusal: Callable[[], Awaitable[None]] | None = None,
    ) -> _T:
        return await answer(self._services.authenticator, context, serve, before_refusal)
