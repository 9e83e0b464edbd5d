"""Files of tenants, over a real Redis and a folder."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.storage import BatchStorage, MissingObjectError, file_path
from rempart_platform.batch.testing import CALLER, ENDPOINT, BatchRig, as_input, in_pieces, request_line
from rempart_platform.batch.values import MAX_PIECE_BYTES, BatchLimits
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.object_store import open_object_store
from rempart_platform.tenancy.batch_keys import UPLOADS
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

CONFIG = BatchConfig(
    limits=BatchLimits(max_file_bytes=1000, max_files_per_tenant=3, max_transfers_per_tenant=6, file_lifetime_s=500)
)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as redis:
        yield redis


@pytest.fixture
def rig(redis: RedisClient, tmp_path: Path) -> BatchRig:
    return BatchRig(redis, tmp_path, CONFIG)


def objects(rig: BatchRig) -> list[str]:
    root = rig.folder / "objects"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def num_noted(rig: BatchRig) -> int:
    return int(await rig.redis.call(lambda redis: redis.zcard(UPLOADS)))


async def content_of(rig: BatchRig, tenant: str, file_id: str) -> bytes:
    return b"".join([piece async for piece in rig.files.read(await rig.files.get(tenant, file_id))])


async def test_what_is_uploaded_is_listed_and_read_by_its_tenant_alone(rig: BatchRig) -> None:
    first = await rig.files.create("acme", "ä name.jsonl", "batch", in_pieces(b"one\n" * 200, 7))
    second = await rig.files.create("acme", "two", "other", in_pieces(b""), lifetime_s=lambda: 0)
    assert (first.num_bytes, first.created_s, first.expires_s) == (800, 1_000_000, 1_000_500)
    assert (second.num_bytes, second.expires_s) == (0, 0)
    assert await rig.files.get("acme", first.file_id) == first
    assert list(await rig.files.list("acme")) == [second, first]
    assert list(await rig.files.list("acme", purpose="batch")) == [first]
    assert list(await rig.files.list("globex")) == []
    assert await content_of(rig, "acme", first.file_id) == b"one\n" * 200
    assert await content_of(rig, "acme", second.file_id) == b""
    for call in (rig.files.get("globex", first.file_id), rig.files.delete("globex", first.file_id)):
        with pytest.raises(RempartError) as caught:
            await call
        assert caught.value.kind is ErrorKind.NOT_FOUND


async def test_a_deleted_file_leaves_nothing(rig: BatchRig) -> None:
    file_id = await rig.upload(b"content")
    await rig.files.delete("acme", file_id)
    assert (objects(rig), await num_noted(rig), list(await rig.files.list("acme"))) == ([], 0, [])
    with pytest.raises(RempartError, match="no such file"):
        await rig.files.delete("acme", file_id)


async def test_a_file_that_is_too_large_leaves_nothing(rig: BatchRig) -> None:
    with pytest.raises(RempartError, match="max_file_bytes") as caught:
        await rig.upload(b"x" * 1001)
    assert caught.value.kind is ErrorKind.REQUEST_TOO_LARGE
    assert (objects(rig), await num_noted(rig)) == ([], 0)


async def test_an_upload_whose_client_goes_away_leaves_nothing(rig: BatchRig) -> None:
    has_begun, never = asyncio.Event(), asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"the first half"
        has_begun.set()
        await never.wait()

    upload = asyncio.create_task(rig.files.create("acme", "half", "batch", content()))
    await has_begun.wait()
    assert await num_noted(rig) == 1
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert (await num_noted(rig), list(await rig.files.list("acme"))) == (0, [])
    async with asyncio.timeout(30):
        while objects(rig):  # noqa: ASYNC110 - a thread of the store removes what it has of it, and tells nobody
            await asyncio.sleep(0.01)


async def test_an_upload_that_the_storage_took_and_did_not_say_so_leaves_nothing(rig: BatchRig) -> None:
    class LosesAnswers(BatchStorage):
        async def put_stream(self, path: str, pieces: AsyncIterator[bytes]) -> None:
            await super().put_stream(path, pieces)
            raise RempartError(ErrorKind.UNAVAILABLE, "no answer")

    rig.use(LosesAnswers(open_object_store(f"file://{rig.folder}/objects")))
    with pytest.raises(RempartError, match="no answer"):
        await rig.upload(b"x")
    assert (objects(rig), await num_noted(rig)) == ([], 0)


async def test_an_upload_with_a_bad_lifetime_leaves_nothing(rig: BatchRig) -> None:
    def refuse() -> int:
        raise RempartError(ErrorKind.INVALID_REQUEST, "no such time")

    with pytest.raises(RempartError, match="no such time"):
        await rig.files.create("acme", "x", "batch", in_pieces(b"x"), lifetime_s=refuse)
    assert (objects(rig), await num_noted(rig)) == ([], 0)


async def test_a_tenant_may_have_as_many_files_and_no_more(rig: BatchRig) -> None:
    uploads = await asyncio.gather(*(rig.upload(b"x") for _ in range(6)), return_exceptions=True)
    refused = [each for each in uploads if isinstance(each, RempartError)]
    assert len(refused) == 3
    assert all("max_files_per_tenant" in each.message for each in refused)
    assert len(objects(rig)) == len(await rig.files.list("acme")) == 3
    assert await num_noted(rig) == 0
    await rig.upload(b"x", "globex")


async def test_a_tenant_may_have_as_many_transfers_at_a_time_and_no_more(rig: BatchRig) -> None:
    has_begun, may_end = asyncio.Semaphore(0), asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        has_begun.release()
        await may_end.wait()
        yield b"x"

    uploads = [asyncio.create_task(rig.files.create("acme", "x", "batch", content())) for _ in range(6)]
    for _ in uploads:
        await has_begun.acquire()
    with pytest.raises(RempartError, match="max_transfers_per_tenant") as caught:
        await rig.upload(b"x")
    assert caught.value.kind is ErrorKind.RATE_LIMIT_EXCEEDED
    theirs = await rig.upload(b"x", "globex")
    assert await content_of(rig, "globex", theirs) == b"x"
    uploads[0].cancel()
    may_end.set()
    ended = await asyncio.gather(*uploads, return_exceptions=True)
    assert sum(isinstance(each, RempartError) for each in ended) == 2, "no more than the files that it may have"
    file = (await rig.files.list("acme"))[0]
    downloads = [rig.files.read(file) for _ in range(7)]
    assert [await anext(pieces) for pieces in downloads[:6]] == [b"x"] * 6
    with pytest.raises(RempartError, match="max_transfers_per_tenant"):
        await anext(downloads[6])
    for pieces in downloads:
        await pieces.aclose()
    assert await content_of(rig, "acme", file.file_id) == b"x"


async def test_a_content_comes_in_pieces_that_are_not_too_large(rig: BatchRig) -> None:
    content = bytes(range(256)) * 5000
    file = await rig.files.put(await rig.files.get("acme", await rig.upload(b"")), in_pieces(content))
    pieces = [piece async for piece in rig.files.read(file)]
    assert b"".join(pieces) == content
    assert 0 < min(map(len, pieces)) <= max(map(len, pieces)) <= MAX_PIECE_BYTES


async def test_a_lifetime_is_asked_for_when_the_content_is_whole(rig: BatchRig) -> None:
    has_ended = False

    async def content() -> AsyncIterator[bytes]:
        nonlocal has_ended
        yield b"x"
        has_ended = True

    file = await rig.files.create("acme", "x", "batch", content(), lifetime_s=lambda: 7 if has_ended else 5)
    assert file.expires_s == file.created_s + 7


@pytest.mark.parametrize(("asked_s", "kept_s"), [(None, 500), (40, 40)])
async def test_results_are_kept_as_long_as_the_batch_says(rig: BatchRig, asked_s: int | None, kept_s: int) -> None:
    batch = await rig.batches.create(
        CALLER,
        input_file_id=await rig.upload(as_input([request_line(1)])),
        endpoint=ENDPOINT,
        completion_window_s=3600,
        metadata={},
        output_lifetime_s=asked_s,
    )
    assert batch.output_lifetime_s == (await rig.reload(batch)).output_lifetime_s == asked_s
    async with rig.working():
        batch = await rig.ended(batch)
    output = await rig.files.get("acme", batch.output_file_id)
    assert output.expires_s == output.created_s + kept_s


async def test_a_file_that_has_expired_is_not_there_and_a_janitor_removes_it(rig: BatchRig) -> None:
    file_id = await rig.upload(b"x")
    await rig.janitor().clean()
    assert len(objects(rig)) == 1
    rig.now_s += 501
    with pytest.raises(RempartError, match="no such file"):
        await rig.files.get("acme", file_id)
    assert list(await rig.files.list("acme")) == []
    await rig.janitor().clean()
    assert (objects(rig), await num_noted(rig)) == ([], 0)


async def test_what_a_crash_left_of_an_upload_is_removed_after_its_time(rig: BatchRig) -> None:
    await rig.storage.put_first(file_path("acme", "file-lost"), b"x")
    given_up_s = rig.now_s + CONFIG.upload_timeout_s
    await rig.redis.call(lambda redis: redis.zadd(UPLOADS, {"acme file-lost": given_up_s}))
    await rig.janitor().clean()
    assert objects(rig) == ["files/acme/file-lost"]
    rig.now_s = given_up_s + 1
    await rig.janitor().clean()
    assert (objects(rig), await num_noted(rig)) == ([], 0)


async def test_the_input_of_an_open_batch_is_neither_deleted_nor_expired(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(1)], window_s=2000)
    with pytest.raises(RempartError, match="Cancel that first") as caught:
        await rig.files.delete("acme", batch.input_file_id)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    rig.now_s += 501
    await rig.janitor().clean()
    async with rig.working():
        batch = await rig.ended(batch)
    assert batch.counts.completed == 1
    await rig.janitor().clean()
    with pytest.raises(MissingObjectError):
        await rig.storage.get(file_path("acme", batch.input_file_id))


async def test_a_content_that_is_gone_is_a_file_that_is_not_there(rig: BatchRig) -> None:
    file_id = await rig.upload(b"x")
    await rig.storage.delete(file_path("acme", file_id))
    with pytest.raises(RempartError, match="no such file"):
        await content_of(rig, "acme", file_id)
