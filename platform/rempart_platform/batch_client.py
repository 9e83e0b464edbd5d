"""`rempart.v1.Batches` as a client sees it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio

from rempart_protos.v1 import batch_pb2, batch_pb2_grpc

if TYPE_CHECKING:  # exists in the stubs alone
    from rempart_protos.v1.batch_pb2_grpc import BatchesAsyncStub

_TIMEOUT_S = 10.0
_CHUNK_BYTES = 256 * 1024


class BatchClient:
    """Every call raises grpc.RpcError; `rpc_failure.describe` makes one line of it."""

    def __init__(self, stub: "BatchesAsyncStub", key: str) -> None:
        self._stub = stub
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def upload(self, path: Path, on_sent: Callable[[int], None]) -> batch_pb2.StoredFile:
        """Stores a local file. `on_sent` is told of every piece's bytes. Raises OSError when it cannot be read."""
        with path.open("rb") as source:
            call = self._stub.UploadFile(metadata=self._metadata)
            try:
                # A name on disk may be any bytes; here it is a label.
                name = os.fsencode(path.name).decode(errors="replace")
                said = batch_pb2.FileMetadata(filename=name, purpose="batch")
                await call.write(batch_pb2.UploadFileRequest(metadata=said))
                while content := await asyncio.to_thread(source.read, _CHUNK_BYTES):
                    await call.write(batch_pb2.UploadFileRequest(content=content))
                    on_sent(len(content))
                await call.write(batch_pb2.UploadFileRequest(end=batch_pb2.FileEnd()))
                await call.done_writing()
            except asyncio.InvalidStateError:
                pass  # refused before its end; what follows says why
            return await call

    async def download(self, file_id: str, path: Path) -> None:
        """Writes a stored file to `path`, whole or not at all. Raises OSError when it cannot be written."""
        unfinished = path.with_name(f"{path.name}.part")
        try:
            with unfinished.open("wb") as target:
                request = batch_pb2.DownloadFileRequest(file_id=file_id)
                async for chunk in self._stub.DownloadFile(request, metadata=self._metadata):
                    await asyncio.to_thread(target.write, chunk.content)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    async def create(
        self, input_file_id: str, endpoint: str, window: str, metadata: Mapping[str, str]
    ) -> batch_pb2.Batch:
        request = batch_pb2.CreateBatchRequest(
            input_file_id=input_file_id, endpoint=endpoint, completion_window=window, metadata=metadata
        )
        return await self._stub.CreateBatch(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def get(self, batch_id: str) -> batch_pb2.Batch:
        request = batch_pb2.GetBatchRequest(batch_id=batch_id)
        return await self._stub.GetBatch(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def list(self, limit: int) -> list[batch_pb2.Batch]:
        """The newest ones."""
        request = batch_pb2.ListBatchesRequest(limit=limit)
        return list((await self._stub.ListBatches(request, metadata=self._metadata, timeout=_TIMEOUT_S)).batches)

    async def cancel(self, batch_id: str) -> batch_pb2.Batch:
        request = batch_pb2.CancelBatchRequest(batch_id=batch_id)
        return await self._stub.CancelBatch(request, metadata=self._metadata, timeout=_TIMEOUT_S)


@asynccontextmanager
async def open_batches(address: str, key: str) -> AsyncIterator[BatchClient]:
    """A client of the router at `address`; nothing is sent before the first call."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield BatchClient(batch_pb2_grpc.BatchesStub(channel), key)
