"""Files and batch jobs in memory, behind the real front ends."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc

from rempart_platform.apis.batch_grpc import BatchesServicer
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.services import ApiServices
from rempart_platform.apis.testing import FakeDispatcher, fake_services
from rempart_platform.batch.values import Batch, BatchLimits, BatchStatus, LineCounts, StoredFile, file_too_large
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller
from rempart_protos.v1 import batch_pb2_grpc

NOW_S = 1_700_000_000


class FakeFiles:
    """Keeps what was uploaded whole. `taken` is set when a piece has come, `ended` when an upload has, well or not, and
    `read_ended` when a download has.

    `failure` is raised by `read` before piece number `fail_at`; `piece_bytes` is how much it gives at a time, and
    `end_s` how long it then takes to find that there is no more.
    """

    def __init__(self) -> None:
        self.limits = BatchLimits()
        self.stored: dict[str, tuple[StoredFile, bytes]] = {}
        self.taken = asyncio.Event()
        self.ended = asyncio.Event()
        self.read_ended = asyncio.Event()
        self.failure: RempartError | None = None
        self.fail_at = 0
        self.piece_bytes = 1000
        self.end_s = 0.0
        self.in_use: set[str] = set()
        self._numbers = itertools.count(1)

    async def create(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        content: AsyncIterator[bytes],
        *,
        lifetime_s: Callable[[], int | None] = lambda: None,
    ) -> StoredFile:
        try:
            kept = b""
            async for piece in content:
                kept += piece
                if len(kept) > self.limits.max_file_bytes:
                    raise file_too_large(self.limits)
                self.taken.set()
        finally:
            self.ended.set()
        asked_s = lifetime_s()
        return self.add(tenant, kept, filename, purpose, expires_s=NOW_S + asked_s if asked_s else 0)

    def add(
        self, tenant: str, content: bytes, filename: str = "in.jsonl", purpose: str = "batch", expires_s: int = 0
    ) -> StoredFile:
        number = next(self._numbers)
        file = StoredFile(f"file-{number:032x}", tenant, filename, purpose, len(content), NOW_S + number, expires_s)
        self.stored[file.file_id] = (file, content)
        return file

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        file, _ = self.stored.get(file_id, (None, b""))
        if file is None or file.tenant != tenant:
            raise RempartError(ErrorKind.NOT_FOUND, f"There is no file '{file_id}'.")
        return file

    async def list(self, tenant: str, *, purpose: str = "") -> Sequence[StoredFile]:
        files = [file for file, _ in self.stored.values() if file.tenant == tenant and purpose in ("", file.purpose)]
        return files[::-1]

    async def delete(self, tenant: str, file_id: str) -> None:
        await self.get(tenant, file_id)
        if file_id in self.in_use:
            raise RempartError(ErrorKind.INVALID_REQUEST, "A batch reads the file.")
        del self.stored[file_id]

    async def read(self, file: StoredFile) -> AsyncGenerator[bytes, None]:
        content = self.stored[file.file_id][1]
        try:
            for number, start in enumerate(range(0, len(content), self.piece_bytes)):
                if self.failure is not None and number == self.fail_at:
                    raise self.failure
                yield content[start : start + self.piece_bytes]
            await asyncio.sleep(self.end_s)
        finally:
            self.read_ended.set()


class FakeBatches:
    """Batches that tests move on: by `change`, or, when `works`, a step with each look at them."""

    def __init__(self, files: FakeFiles) -> None:
        self.kept: dict[str, Batch] = {}
        self.works = False
        self._files = files
        self._numbers = itertools.count(1)

    async def create(
        self,
        caller: Caller,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window_s: int,
        metadata: Mapping[str, str],
        output_lifetime_s: int | None = None,
    ) -> Batch:
        await self._files.get(caller.tenant, input_file_id)
        self._files.in_use.add(input_file_id)
        number = next(self._numbers)
        batch = Batch(
            batch_id=f"batch_{number:032x}",
            caller=caller,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window_s=completion_window_s,
            status=BatchStatus.VALIDATING,
            created_s=NOW_S + number,
            expires_s=NOW_S + number + completion_window_s,
            metadata=metadata,
            output_lifetime_s=output_lifetime_s,
        )
        self.kept[batch.batch_id] = batch
        return batch

    def change(self, batch_id: str, **fields: object) -> Batch:
        self.kept[batch_id] = replace(self.kept[batch_id], **fields)  # type: ignore[arg-type] # fields by name
        return self.kept[batch_id]

    async def get(self, tenant: str, batch_id: str) -> Batch:
        batch = self.kept.get(batch_id)
        if batch is None or batch.caller.tenant != tenant:
            raise RempartError(ErrorKind.NOT_FOUND, f"There is no batch '{batch_id}'.")
        return self._step(batch) if self.works else batch

    async def list(self, tenant: str, *, limit: int, after: str = "") -> tuple[Sequence[Batch], bool]:
        found = [batch for batch in self.kept.values() if batch.caller.tenant == tenant][::-1]
        ids = ["", *(batch.batch_id for batch in found)]
        if after not in ids:
            raise RempartError(ErrorKind.INVALID_REQUEST, "There is no such batch.", param="after")
        start = ids.index(after)
        return found[start : start + limit], start + limit < len(found)

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        batch = await self.get(tenant, batch_id)
        if batch.status.is_final:
            raise RempartError(ErrorKind.INVALID_REQUEST, "The batch has ended.")
        return self.change(batch_id, status=BatchStatus.CANCELLING, cancelling_s=NOW_S)

    def _step(self, batch: Batch) -> Batch:
        """Every line with "bad" in it is answered with an error, all others with themselves."""
        lines = self._files.stored[batch.input_file_id][1].splitlines(keepends=True)
        failed = [line for line in lines if b"bad" in line]
        answered = [line for line in lines if line not in failed]
        match batch.status:
            case BatchStatus.VALIDATING:
                counts = LineCounts(total=len(lines))
                return self.change(batch.batch_id, status=BatchStatus.IN_PROGRESS, counts=counts, model="tiny")
            case BatchStatus.IN_PROGRESS:
                tenant = batch.caller.tenant
                output = self._files.add(tenant, b"".join(answered), "out.jsonl", "batch_output")
                errors = self._files.add(tenant, b"".join(failed), "errors.jsonl", "batch_output") if failed else None
                return self.change(
                    batch.batch_id,
                    status=BatchStatus.COMPLETED,
                    counts=LineCounts(len(lines), len(answered), len(failed)),
                    output_file_id=output.file_id,
                    error_file_id=errors.file_id if errors else "",
                    completed_s=NOW_S,
                )
            case _:
                return batch


def batch_services(
    files: FakeFiles, batches: FakeBatches, *, limits: BatchLimits | None = None, http: HttpLimits | None = None
) -> ApiServices:
    """Services with batch jobs on."""
    files.limits = limits or BatchLimits()
    services = fake_services(FakeDispatcher(), http=http)
    return replace(services, files=files, batches=batches, batch_limits=files.limits)


@asynccontextmanager
async def serve_batches(services: ApiServices, limits: GrpcLimits | None = None) -> AsyncIterator[str]:
    """`rempart.v1.Batches` of these services on a free port of 127.0.0.1; its address."""
    limits = limits or GrpcLimits()
    server = grpc.aio.server(options=limits.server_options())
    batch_pb2_grpc.add_BatchesServicer_to_server(BatchesServicer(services, limits), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
