"""`rempart.v1.Batches` as a client sees it."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import grpc

from rempart_protos.v1 import batch_pb2, batch_pb2_grpc

_TIMEOUT_S = 10.0
_CHUNK_BYTES = 256 * 1024
_CHANNEL_OPTIONS = (
    # Uploads and downloads may take any time; a router that is gone without a word ends them all the same.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),  # a list of batches with all that is wrong with them
)


class BatchClient:
    """Every call raises grpc.RpcError; `rpc_failure.describe` makes one line of it.

    Not asyncio: there, an upload that is refused midway ends with INTERNAL instead of with what the router said.
    """

    def __init__(self, stub: batch_pb2_grpc.BatchesStub, key: str) -> None:
        self._stub = stub
        self._metadata = (("authorization", f"Bearer {key}"),)

    def upload(self, path: Path, on_sent: Callable[[int], None]) -> batch_pb2.StoredFile:
        """Stores a local file. `on_sent` is told of every piece's bytes. Raises OSError when it cannot be read."""
        with path.open("rb") as source:
            messages = _UploadMessages(path, source, on_sent)
            try:
                return self._stub.UploadFile(iter(messages), metadata=self._metadata)
            except grpc.RpcError:
                if messages.failure is not None:
                    raise messages.failure from None
                raise

    def download(self, file_id: str, path: Path) -> None:
        """Writes a stored file to `path`, whole or not at all. Raises OSError when it cannot be written."""
        unfinished = path.with_name(f"{path.name}.part")
        with unfinished.open("xb") as target:  # not that of another download
            try:
                request = batch_pb2.DownloadFileRequest(file_id=file_id)
                for chunk in self._stub.DownloadFile(request, metadata=self._metadata):
                    target.write(chunk.content)
                target.close()
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)

    def create(self, input_file_id: str, endpoint: str, window: str, metadata: Mapping[str, str]) -> batch_pb2.Batch:
        request = batch_pb2.CreateBatchRequest(
            input_file_id=input_file_id, endpoint=endpoint, completion_window=window, metadata=metadata
        )
        return self._stub.CreateBatch(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    def get(self, batch_id: str) -> batch_pb2.Batch:
        request = batch_pb2.GetBatchRequest(batch_id=batch_id)
        return self._stub.GetBatch(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    def list(self, limit: int) -> list[batch_pb2.Batch]:
        """The newest ones."""
        request = batch_pb2.ListBatchesRequest(limit=limit)
        return list(self._stub.ListBatches(request, metadata=self._metadata, timeout=_TIMEOUT_S).batches)

    def cancel(self, batch_id: str) -> batch_pb2.Batch:
        request = batch_pb2.CancelBatchRequest(batch_id=batch_id)
        return self._stub.CancelBatch(request, metadata=self._metadata, timeout=_TIMEOUT_S)


@contextmanager
def open_batches(address: str, key: str) -> Iterator[BatchClient]:
    """A client of the router at `address`; nothing is sent before the first call."""
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        yield BatchClient(batch_pb2_grpc.BatchesStub(channel), key)


class _UploadMessages:
    """A file as messages. A read that fails ends them early, so that nothing is stored, and is kept as `failure`."""

    def __init__(self, path: Path, source: BinaryIO, on_sent: Callable[[int], None]) -> None:
        self.failure: OSError | None = None
        self._path = path
        self._source = source
        self._on_sent = on_sent

    def __iter__(self) -> Iterator[batch_pb2.UploadFileRequest]:
        # A name on disk may be any bytes; here it is a label.
        name = os.fsencode(self._path.name).decode(errors="replace")
        yield batch_pb2.UploadFileRequest(metadata=batch_pb2.FileMetadata(filename=name, purpose="batch"))
        try:
            while content := self._source.read(_CHUNK_BYTES):
                yield batch_pb2.UploadFileRequest(content=content)
                self._on_sent(len(content))
        except OSError as error:
            self.failure = error
            return
        yield batch_pb2.UploadFileRequest(end=batch_pb2.FileEnd())
