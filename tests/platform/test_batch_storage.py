"""What batch jobs ask of a folder and of a bucket."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from obstore.store import S3Store
from tests.buckets import Bucket

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.storage import BatchStorage, MissingObjectError
from rempart_platform.batch.testing import BatchRig, in_pieces, request_line, right_texts
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.object_store import ObjectStore, open_object_store
from rempart_platform.tenancy.testing import own_redis

ACCESS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "fr-par"}
LARGE = 6 * 1024 * 1024  # more than one part of an upload


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_object_store(f"file://{tmp_path}/objects")
    found: Bucket = request.getfixturevalue("bucket")
    return open_object_store(f"{found.url}/objects", found.environ)


async def all_of(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


async def test_objects_are_put_got_and_deleted(store: ObjectStore) -> None:
    storage = BatchStorage(store)
    assert await storage.put_first("a/one", b"first")
    assert not await storage.put_first("a/one", b"second")
    assert await storage.get("a/one") == b"first"
    assert await storage.get_range("a/one", 1, 3) == b"ir"
    await storage.put_stream("a/two", in_pieces(b"x" * LARGE))
    assert await all_of(storage.stream("a/two")) == b"x" * LARGE
    await storage.put_stream("a/two", in_pieces(b"new"))
    assert await all_of(storage.stream("a/two")) == b"new"
    await storage.put_stream("b/empty", in_pieces(b""))
    assert await all_of(storage.stream("b/empty")) == b""
    await storage.delete_all("a")
    await storage.delete("a/one")
    for path in ("a/one", "a/two"):
        with pytest.raises(MissingObjectError):
            await storage.get(path)
        with pytest.raises(MissingObjectError):
            await all_of(storage.stream(path))
    assert await storage.get("b/empty") == b""


async def test_what_is_kept_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis forgets lines and lists files because of it. Also what another put, who may not have come to that."""
    storage = BatchStorage(open_object_store(f"file://{tmp_path}"))
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(os.readlink(f"/proc/self/fd/{opened}")))
    places = [str(tmp_path / place) for place in ("a/one", "a", ".")]
    assert await storage.put_first("a/one", b"first")
    assert synced == places
    assert not await storage.put_first("a/one", b"second")
    assert synced == 2 * places
    await storage.put_stream("a/one", in_pieces(b"third"))
    assert synced == 3 * places


async def test_a_disk_that_fails_keeps_nothing_for_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(opened: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RempartError, match="storage of batch jobs does not answer"):
        await BatchStorage(open_object_store(f"file://{tmp_path}")).put_first("a/one", b"first")


async def test_two_that_delete_the_same_do_each_other_no_harm(store: ObjectStore) -> None:
    storage = BatchStorage(store)
    for number in range(100):
        await storage.put_first(f"a/{number}", b"x")
    await asyncio.gather(*(storage.delete_all("a") for _ in range(4)))
    with pytest.raises(MissingObjectError):
        await storage.get("a/99")


def test_an_emptied_folder_goes_with_its_last_object(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    store = open_object_store(f"file://{folder}")
    store.put("jobs/acme/one/plan", b"x")
    store.put("jobs/acme/two/plan", b"x")
    store.delete("jobs/acme/one/plan")
    assert [path.name for path in (folder / "jobs" / "acme").iterdir()] == ["two"]
    store.delete("jobs/acme/two/plan")
    assert list(folder.iterdir()) == []
    assert folder.is_dir()


async def test_what_a_writer_that_died_left_goes_with_the_object(tmp_path: Path) -> None:
    storage = BatchStorage(open_object_store(f"file://{tmp_path}/objects"))
    folder = tmp_path / "objects" / "files" / "acme"
    is_under_way = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"x" * LARGE
        is_under_way.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(storage.put_stream("files/acme/file-1", endless()))
    await is_under_way.wait()
    (unfinished,) = [path.name for path in folder.iterdir()]
    upload.cancel()
    await asyncio.wait({upload})
    for name in (unfinished, "file-1", "file-10", "file-2#1"):
        (folder / name).write_bytes(b"x")
    await storage.delete("files/acme/file-1")
    assert {path.name for path in folder.iterdir()} == {"file-10", "file-2#1"}
    await storage.delete_all("files/acme")
    assert not folder.exists() or [*folder.iterdir()] == []


async def test_writers_do_not_mind_that_folders_go_beside_them(tmp_path: Path) -> None:
    storage = BatchStorage(open_object_store(f"file://{tmp_path}/objects"))

    async def put_and_delete(name: str) -> None:
        for _ in range(100):
            assert await storage.put_first(f"jobs/acme/one/{name}", b"x")
            assert await storage.get(f"jobs/acme/one/{name}") == b"x"
            await storage.delete(f"jobs/acme/one/{name}")

    await asyncio.gather(*(put_and_delete(name) for name in "abcd"))


async def test_a_stream_that_breaks_leaves_nothing(store: ObjectStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * LARGE
        raise RempartError(ErrorKind.REQUEST_TOO_LARGE, "too large")

    storage = BatchStorage(store)
    with pytest.raises(RempartError, match="too large"):
        await storage.put_stream("broken", broken())
    with pytest.raises(MissingObjectError):
        await storage.get("broken")


async def test_an_upload_holds_few_parts_while_the_bucket_is_slow() -> None:
    begun = b"<InitiateMultipartUploadResult><Bucket/><Key/><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    parts = asyncio.Semaphore(0)
    may_end = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
            head = f"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len(begun)}\r\n\r\n"
            writer.write(head.encode() + begun)
        else:
            parts.release()
            await may_end.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    environ = {**ACCESS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    storage = BatchStorage(open_object_store("s3://bucket", environ))
    async with server:
        upload = asyncio.create_task(storage.put_stream("x", in_pieces(b"x" * 10 * LARGE)))
        async with asyncio.timeout(10):
            for _ in range(2):
                await parts.acquire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await parts.acquire()
        upload.cancel()
        await asyncio.wait({upload})
        may_end.set()


async def test_a_storage_that_does_not_answer_is_an_answer_of_ours() -> None:
    store = S3Store(
        "bucket",
        endpoint="http://127.0.0.1:9",
        access_key_id="id",
        secret_access_key="secret",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    storage = BatchStorage(store)
    for call in (storage.get("x"), storage.put_first("x", b""), storage.delete("x"), all_of(storage.stream("x"))):
        with pytest.raises(RempartError) as caught:
            await call
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert "127.0.0.1" not in caught.value.message


async def test_a_whole_batch_over_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    async with own_redis() as redis:
        rig = BatchRig(redis, tmp_path, BatchConfig(lines_per_shard=4, poll_s=0.02))
        rig.use(BatchStorage(open_object_store(f"{bucket.url}/objects", bucket.environ)))
        async with rig.working():
            batch = await rig.ended(await rig.submit([request_line(number) for number in range(10)]))
        assert await rig.texts(batch) == right_texts(range(10))
        rig.now_s += rig.config.keep_parts_s + 1
        await rig.janitor().clean()
        assert await rig.texts(batch) == right_texts(range(10))
