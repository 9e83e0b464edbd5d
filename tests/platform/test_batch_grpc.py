"""apis/batch_grpc.py, as a client generated from the protos sees it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import grpc
import pytest

from rempart_platform.apis.batch_testing import NOW_S, FakeBatches, FakeFiles, batch_services, serve_batches
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.testing import CALLER, KEY, OTHER_KEY, FakeDispatcher, fake_services
from rempart_platform.batch.values import MAX_PIECE_BYTES, BatchLimits, BatchStatus, InputError, LineCounts
from rempart_platform.errors import ErrorKind, RempartError
from rempart_protos.v1 import batch_pb2, batch_pb2_grpc

if TYPE_CHECKING:  # exists in the stubs alone
    from rempart_protos.v1.batch_pb2_grpc import BatchesAsyncStub

AUTH = (("authorization", f"Bearer {KEY}"),)
OTHER = (("authorization", f"Bearer {OTHER_KEY}"),)
CHAT = "/v1/chat/completions"
CONTENT = b'{"custom_id": "a"}\n'
UNKNOWN = "0" * 32
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@asynccontextmanager
async def stub_of(
    files: FakeFiles, batches: FakeBatches | None = None, grpc_limits: GrpcLimits | None = None, **kwargs: object
) -> AsyncIterator["BatchesAsyncStub"]:
    services = batch_services(files, batches or FakeBatches(files), **kwargs)  # type: ignore[arg-type] # by name
    async with serve_batches(services, grpc_limits) as address, grpc.aio.insecure_channel(address) as channel:
        yield batch_pb2_grpc.BatchesStub(channel)


def about(filename: str = "in.jsonl", purpose: str = "batch", **fields: int) -> batch_pb2.UploadFileRequest:
    metadata = batch_pb2.FileMetadata(filename=filename, purpose=purpose, **fields)
    return batch_pb2.UploadFileRequest(metadata=metadata)


END = batch_pb2.UploadFileRequest(end=batch_pb2.FileEnd())


def content(data: bytes) -> batch_pb2.UploadFileRequest:
    return batch_pb2.UploadFileRequest(content=data)


async def failure_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def downloaded(stub: "BatchesAsyncStub", file_id: str) -> list[bytes]:
    call = stub.DownloadFile(batch_pb2.DownloadFileRequest(file_id=file_id), metadata=AUTH)
    return [chunk.content async for chunk in call]


async def test_a_files_life() -> None:
    files = FakeFiles()
    async with stub_of(files) as stub:
        parts = iter([about(lifetime_s=7200), content(CONTENT), content(b""), content(CONTENT), END])
        created = await stub.UploadFile(parts, metadata=AUTH)
        assert created == batch_pb2.StoredFile(
            file_id=created.file_id,
            filename="in.jsonl",
            purpose="batch",
            num_bytes=2 * len(CONTENT),
            created_s=NOW_S + 1,
            expires_s=NOW_S + 7200,
        )
        assert files.stored[created.file_id][0].tenant == CALLER.tenant
        assert await stub.GetFile(batch_pb2.GetFileRequest(file_id=created.file_id), metadata=AUTH) == created
        assert b"".join(await downloaded(stub, created.file_id)) == CONTENT * 2
        listed = await stub.ListFiles(batch_pb2.ListFilesRequest(), metadata=AUTH)
        assert (list(listed.files), listed.has_more) == ([created], False)
        files.in_use.add(created.file_id)
        request = batch_pb2.DeleteFileRequest(file_id=created.file_id)
        assert (await failure_of(stub.DeleteFile(request, metadata=AUTH))).code() is INVALID
        files.in_use.clear()
        await stub.DeleteFile(request, metadata=AUTH)
        assert (await failure_of(stub.DeleteFile(request, metadata=AUTH))).code() is NOT_FOUND
    assert files.stored == {}


async def test_a_large_file_comes_back_whole() -> None:
    files = FakeFiles()
    files.piece_bytes = MAX_PIECE_BYTES
    whole = bytes(range(256)) * 20_000
    file_id = files.add(CALLER.tenant, whole).file_id
    async with stub_of(files) as stub:
        assert b"".join(await downloaded(stub, file_id)) == whole
        assert await downloaded(stub, files.add(CALLER.tenant, b"").file_id) == []


async def test_files_come_in_pages_and_in_order() -> None:
    files = FakeFiles()
    ids = [files.add(CALLER.tenant, b"", purpose="batch" if i % 2 else "batch_output").file_id for i in range(5)]
    async with stub_of(files) as stub:

        async def listed(**fields: object) -> tuple[list[str], bool]:
            request = batch_pb2.ListFilesRequest(**fields)  # type: ignore[arg-type] # fields by name
            page = await stub.ListFiles(request, metadata=AUTH)
            return [file.file_id for file in page.files], page.has_more

        assert await listed() == (ids[::-1], False)
        assert await listed(limit=2, oldest_first=True) == (ids[:2], True)
        assert await listed(limit=3, oldest_first=True, after=ids[1]) == (ids[2:], False)
        assert await listed(purpose="batch") == ([ids[3], ids[1]], False)
        for fields in ({"limit": 0}, {"limit": 10_001}, {"after": "file-gone"}):
            request = batch_pb2.ListFilesRequest(**fields)
            assert (await failure_of(stub.ListFiles(request, metadata=AUTH))).code() is INVALID


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "first message must have the metadata"),
        ([content(CONTENT)], "first message must have the metadata"),
        ([batch_pb2.UploadFileRequest()], "first message must have the metadata"),
        ([END], "first message must have the metadata"),
        ([about(), content(CONTENT), about(), END], "Only the first message"),
        ([about(), content(CONTENT)], "broke off"),
        ([about(filename="")], "1 to 255 characters"),
        ([about(filename="x" * 256)], "1 to 255 characters"),
        ([about(filename="a\nb")], "control characters"),
        ([about(purpose="")], "'purpose' must be 'batch'"),
        ([about(purpose="fine-tune")], "'purpose' must be 'batch'"),
        ([about(lifetime_s=3599)], "between 3600 and 2592000"),
        ([about(lifetime_s=-1)], "between 3600 and 2592000"),
        ([about(), content(b"x" * 600), content(b"x" * 401)], "1000 bytes are allowed (limit max_file_bytes)"),
    ],
)
async def test_a_hostile_upload_is_refused_and_nothing_is_kept(
    parts: list[batch_pb2.UploadFileRequest], said: str
) -> None:
    files = FakeFiles()
    async with stub_of(files, limits=BatchLimits(max_file_bytes=1000)) as stub:
        refused = await failure_of(stub.UploadFile(iter(parts), metadata=AUTH))
    assert refused.code() is INVALID
    assert said in (refused.details() or "")
    assert files.stored == {}


@pytest.mark.parametrize("num_before", [0, 1, 2])
async def test_what_is_no_message_is_the_clients_mistake(num_before: int) -> None:
    files = FakeFiles()
    parts = [about().SerializeToString(), content(CONTENT).SerializeToString()]
    async with (
        serve_batches(batch_services(files, FakeBatches(files))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        upload: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/rempart.v1.Batches/UploadFile")
        assert (await failure_of(upload(iter([*parts[:num_before], b"\xff"]), metadata=AUTH))).code() is INVALID
    assert files.stored == {}


async def test_a_client_that_is_still_sending_sees_why_it_is_refused() -> None:
    files = FakeFiles()
    parts = [about(purpose="fine-tune"), *[content(b"x" * 100_000)] * 100, END]
    async with stub_of(files) as stub:
        for auth, code in ((AUTH, INVALID), ((), grpc.StatusCode.UNAUTHENTICATED)):
            assert (await failure_of(stub.UploadFile(iter(parts), metadata=auth))).code() is code
    assert files.stored == {}


async def test_a_file_is_passed_on_before_it_has_come_whole() -> None:
    files = FakeFiles()
    async with stub_of(files) as stub, asyncio.timeout(30):
        call = stub.UploadFile(metadata=AUTH)
        await call.write(about())
        await call.write(content(CONTENT))
        await files.taken.wait()
        assert not files.ended.is_set()
        await call.write(END)
        await call.done_writing()
        assert (await call).num_bytes == len(CONTENT)


async def test_a_client_that_stalls_is_given_up_and_nothing_is_kept() -> None:
    files = FakeFiles()
    async with stub_of(files, http=HttpLimits(body_grace_s=0.2)) as stub, asyncio.timeout(30):
        call = stub.UploadFile(metadata=AUTH)
        await call.write(about())
        await call.write(content(CONTENT))
        assert (await failure_of(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (files.ended.is_set(), files.stored) == (True, {})


async def test_nothing_is_kept_of_a_client_that_goes_midway() -> None:
    files = FakeFiles()
    async with stub_of(files) as stub, asyncio.timeout(30):
        call = stub.UploadFile(metadata=AUTH)
        await call.write(about())
        await call.write(content(CONTENT))
        await files.taken.wait()
        call.cancel()
        await files.ended.wait()
    assert files.stored == {}


async def test_a_download_that_is_not_read_is_cut() -> None:
    files = FakeFiles()
    files.piece_bytes = MAX_PIECE_BYTES
    file_id = files.add(CALLER.tenant, b"x" * 20_000_000).file_id
    async with stub_of(files, grpc_limits=GrpcLimits(write_timeout_s=1.0)) as stub:
        call = stub.DownloadFile(batch_pb2.DownloadFileRequest(file_id=file_id), metadata=AUTH)
        async with asyncio.timeout(30):
            await call.read()
            await files.read_ended.wait()
        call.cancel()


async def test_a_download_that_breaks_off_says_so() -> None:
    files = FakeFiles()
    file_id = files.add(CALLER.tenant, b"x" * 3000).file_id
    files.failure, files.fail_at = RempartError(ErrorKind.UNAVAILABLE, "The storage does not answer."), 2
    async with stub_of(files) as stub:
        broken = await failure_of(downloaded(stub, file_id))
    assert (broken.code(), broken.details()) == (grpc.StatusCode.UNAVAILABLE, "The storage does not answer.")


async def test_a_batchs_life() -> None:
    files = FakeFiles()
    batches = FakeBatches(files)
    file_id = files.add(CALLER.tenant, CONTENT).file_id
    async with stub_of(files, batches) as stub:
        request = batch_pb2.CreateBatchRequest(
            input_file_id=file_id, endpoint=CHAT, metadata={"job": "nightly"}, output_lifetime_s=7200
        )
        created = await stub.CreateBatch(request, metadata=AUTH)
        kept = batches.kept[created.batch_id]
        assert (kept.caller, kept.completion_window_s, kept.metadata) == (CALLER, 86_400, {"job": "nightly"})
        assert created == batch_pb2.Batch(
            batch_id=created.batch_id,
            status=batch_pb2.BATCH_STATUS_VALIDATING,
            endpoint=CHAT,
            input_file_id=file_id,
            completion_window="24h",
            metadata={"job": "nightly"},
            output_lifetime_s=7200,
            counts=batch_pb2.LineCounts(),
            created_s=kept.created_s,
            expires_s=kept.expires_s,
        )
        batches.change(
            created.batch_id,
            status=BatchStatus.FAILED,
            model="tiny",
            counts=LineCounts(10, 7, 3),
            errors=(InputError("invalid_json_line", "No JSON.", "body", 3), InputError("empty_file", "Empty.")),
            failed_s=NOW_S,
        )
        failed = await stub.GetBatch(batch_pb2.GetBatchRequest(batch_id=created.batch_id), metadata=AUTH)
        assert (failed.status, failed.model) == (batch_pb2.BATCH_STATUS_FAILED, "tiny")
        assert failed.counts == batch_pb2.LineCounts(total=10, completed=7, failed=3)
        assert list(failed.errors) == [
            batch_pb2.InputError(code="invalid_json_line", message="No JSON.", param="body", line=3),
            batch_pb2.InputError(code="empty_file", message="Empty."),
        ]
        assert (failed.failed_s, failed.HasField("completed_s")) == (NOW_S, False)
        cancel = batch_pb2.CancelBatchRequest(batch_id=created.batch_id)
        assert (await failure_of(stub.CancelBatch(cancel, metadata=AUTH))).code() is INVALID
        batches.change(created.batch_id, status=BatchStatus.IN_PROGRESS)
        assert (await stub.CancelBatch(cancel, metadata=AUTH)).status == batch_pb2.BATCH_STATUS_CANCELLING


async def test_every_status_has_a_number() -> None:
    files = FakeFiles()
    batches = FakeBatches(files)
    request = batch_pb2.CreateBatchRequest(input_file_id=files.add(CALLER.tenant, b"").file_id, endpoint=CHAT)
    async with stub_of(files, batches) as stub:
        batch_id = (await stub.CreateBatch(request, metadata=AUTH)).batch_id
        for status in BatchStatus:
            batches.change(batch_id, status=status)
            told = (await stub.GetBatch(batch_pb2.GetBatchRequest(batch_id=batch_id), metadata=AUTH)).status
            assert batch_pb2.BatchStatus.Name(told) == f"BATCH_STATUS_{status.name}"


async def test_batches_come_in_pages_newest_first() -> None:
    files = FakeFiles()
    request = batch_pb2.CreateBatchRequest(input_file_id=files.add(CALLER.tenant, b"").file_id, endpoint=CHAT)
    async with stub_of(files) as stub:
        ids = [(await stub.CreateBatch(request, metadata=AUTH)).batch_id for _ in range(22)][::-1]
        first = await stub.ListBatches(batch_pb2.ListBatchesRequest(), metadata=AUTH)
        assert ([batch.batch_id for batch in first.batches], first.has_more) == (ids[:20], True)
        rest = await stub.ListBatches(batch_pb2.ListBatchesRequest(limit=5, after=ids[19]), metadata=AUTH)
        assert ([batch.batch_id for batch in rest.batches], rest.has_more) == (ids[20:], False)
        assert not (await stub.ListBatches(batch_pb2.ListBatchesRequest(), metadata=OTHER)).batches


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "/v1/embeddings"},
        {"endpoint": ""},
        {"completion_window": "169h"},
        {"completion_window": "1d"},
        {"output_lifetime_s": 3599},
        {"output_lifetime_s": 0},
        {"metadata": {str(number): "" for number in range(17)}},
        {"metadata": {"k" * 65: ""}},
        {"metadata": {"k": "v" * 513}},
    ],
)
async def test_the_rules_are_those_of_the_openai_api(change: dict[str, object]) -> None:
    files = FakeFiles()
    batches = FakeBatches(files)
    fields = {"input_file_id": files.add(CALLER.tenant, b"").file_id, "endpoint": CHAT, **change}
    async with stub_of(files, batches) as stub:
        request = batch_pb2.CreateBatchRequest(**fields)  # type: ignore[arg-type] # fields by name
        assert (await failure_of(stub.CreateBatch(request, metadata=AUTH))).code() is INVALID
    assert batches.kept == {}


CALLS: list[Callable[["BatchesAsyncStub", str, str, tuple[tuple[str, str], ...]], Awaitable[object]]] = [
    lambda stub, file, _, auth: stub.GetFile(batch_pb2.GetFileRequest(file_id=file), metadata=auth),
    lambda stub, file, _, auth: stub.DeleteFile(batch_pb2.DeleteFileRequest(file_id=file), metadata=auth),
    lambda stub, file, _, auth: cast(
        Awaitable[object], stub.DownloadFile(batch_pb2.DownloadFileRequest(file_id=file), metadata=auth).read()
    ),
    lambda stub, file, _, auth: stub.CreateBatch(
        batch_pb2.CreateBatchRequest(input_file_id=file, endpoint=CHAT), metadata=auth
    ),
    lambda stub, _, batch, auth: stub.GetBatch(batch_pb2.GetBatchRequest(batch_id=batch), metadata=auth),
    lambda stub, _, batch, auth: stub.CancelBatch(batch_pb2.CancelBatchRequest(batch_id=batch), metadata=auth),
]


async def test_another_tenants_files_and_batches_are_not_there() -> None:
    files = FakeFiles()
    file_id = files.add(CALLER.tenant, CONTENT).file_id
    async with stub_of(files) as stub:
        request = batch_pb2.CreateBatchRequest(input_file_id=file_id, endpoint=CHAT)
        batch_id = (await stub.CreateBatch(request, metadata=AUTH)).batch_id
        for call in CALLS:
            for auth, file, batch in (
                (OTHER, file_id, batch_id),
                (AUTH, f"file-{UNKNOWN}", f"batch_{UNKNOWN}"),
                (AUTH, "../x", "*"),
            ):
                assert (await failure_of(call(stub, file, batch, auth))).code() is NOT_FOUND
    assert list(files.stored) == [file_id]


def messages_of(method: str) -> Iterator[batch_pb2.UploadFileRequest]:
    assert method == "UploadFile"
    return iter([about()])


@pytest.mark.parametrize("has_key", [True, False])
async def test_without_a_key_or_without_storage_no_method_answers(has_key: bool) -> None:
    service = batch_pb2.DESCRIPTOR.services_by_name["Batches"]
    expected = NOT_FOUND if has_key else grpc.StatusCode.UNAUTHENTICATED
    async with (
        serve_batches(fake_services(FakeDispatcher())) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = batch_pb2_grpc.BatchesStub(channel)
        for method in service.methods:
            request = (
                messages_of(method.name) if method.client_streaming else getattr(batch_pb2, method.input_type.name)()
            )
            call = getattr(stub, method.name)(request, metadata=AUTH if has_key else ())
            error = await failure_of(call.read() if method.server_streaming else call)
            assert (method.name, error.code()) == (method.name, expected)
            assert ("operator has not configured" in (error.details() or "")) is has_key
