"""apis/openai_files.py and what it reads with, as the `openai` client and hostile ones see them, over a real server."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import FileObject

from rempart_platform.apis.batch_testing import NOW_S, FakeBatches, FakeFiles, batch_services
from rempart_platform.apis.form_parser import FormParser, Mark, Part
from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.pace import Pace
from rempart_platform.apis.testing import (
    CALLER,
    KEY,
    OTHER_CALLER,
    OTHER_KEY,
    FakeDispatcher,
    fake_services,
    serve_http,
)
from rempart_platform.batch.values import MAX_PIECE_BYTES, BatchLimits
from rempart_platform.errors import ErrorKind, RempartError

CONTENT = b'{"custom_id": "a"}\r\n{"custom_id": "b"}\r\n--x--\r\n'
BOUNDARY = "limit"
LIMITS = HttpLimits(min_body_bytes_per_s=1000, max_form_parts=5, max_part_head_bytes=600, max_field_bytes=100)
PURPOSE = (b'Content-Disposition: form-data; name="purpose"', b"batch")
FILE = (b'Content-Disposition: form-data; name="file"; filename="in.jsonl"', CONTENT)


@asynccontextmanager
async def client_of(files: FakeFiles, key: str = KEY, **kwargs: object) -> AsyncIterator[AsyncOpenAI]:
    services = batch_services(files, FakeBatches(files), **kwargs)  # type: ignore[arg-type] # by name
    async with (
        serve_http(services) as url,
        openai.DefaultAsyncHttpxClient(verify=False) as transport,  # plain HTTP: certificates only take time to load
        AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, http_client=transport) as client,
    ):
        yield client


@asynccontextmanager
async def plain_client_of(files: FakeFiles, **kwargs: object) -> AsyncIterator[httpx.AsyncClient]:
    services = batch_services(files, FakeBatches(files), **kwargs)  # type: ignore[arg-type] # by name
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        serve_http(services) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=60, verify=False) as client,
    ):
        yield client


def form(*parts: tuple[bytes, bytes], end: bytes = b"--\r\n") -> bytes:
    written = b"".join(b"--limit\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return written + b"--limit" + end


def field(name: str, value: str) -> tuple[bytes, bytes]:
    return f'Content-Disposition: form-data; name="{name}"'.encode(), value.encode()


async def post(
    client: httpx.AsyncClient, body: bytes | AsyncIterator[bytes], kind: str | None = None
) -> httpx.Response:
    headers = {"content-type": kind or f"multipart/form-data; boundary={BOUNDARY}"}
    return await client.post("/v1/files", content=body, headers=headers)


async def test_a_files_life() -> None:
    files = FakeFiles()
    async with client_of(files) as client:
        raw = await client.files.with_raw_response.create(file=("ä b.jsonl", CONTENT), purpose="batch")
        created = raw.parse()
        assert json.loads(raw.text).keys() == FileObject.model_fields.keys(), "OpenAI's fields and no other"
        assert created == FileObject(
            id=created.id,
            bytes=len(CONTENT),
            created_at=NOW_S + 1,
            filename="ä b.jsonl",
            object="file",
            purpose="batch",
            status="processed",
        )
        assert files.stored[created.id][0].tenant == CALLER.tenant
        assert await client.files.retrieve(created.id) == created
        content = await client.files.content(created.id)
        assert content.content == CONTENT
        assert content.response.headers["content-type"] == "application/octet-stream"
        assert content.response.headers["content-disposition"] == "attachment; filename*=utf-8''%C3%A4%20b.jsonl"
        deleted = await client.files.delete(created.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (created.id, True, "file")
        with pytest.raises(openai.NotFoundError) as gone:
            await client.files.retrieve(created.id)
    assert gone.value.code == "not_found"
    assert files.stored == {}


async def test_a_file_may_name_its_end() -> None:
    files = FakeFiles()
    async with client_of(files) as client:
        created = await client.files.create(
            file=("in", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
        )
        for seconds in (3599, 30 * 24 * 3600 + 1):
            with pytest.raises(openai.BadRequestError, match="3600 and 2592000") as refused:
                await client.files.create(
                    file=("in", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": seconds}
                )
            assert refused.value.param == "expires_after[seconds]"
    assert created.expires_at == NOW_S + 7200
    assert list(files.stored) == [created.id]


async def test_lists_come_in_pages_and_in_order() -> None:
    files = FakeFiles()
    ids = [files.add(CALLER.tenant, b"", purpose="batch" if i % 2 else "batch_output").file_id for i in range(5)]
    files.add(OTHER_CALLER.tenant, b"")
    async with client_of(files) as client:
        assert [file.id async for file in client.files.list()] == ids[::-1]
        assert [file.id async for file in client.files.list(limit=2)] == ids[::-1], "the client asks for all pages"
        first = await client.files.list(limit=2, order="asc")
        assert ([file.id for file in first.data], first.has_more) == (ids[:2], True)
        second = await client.files.list(limit=3, order="asc", after=ids[1])
        assert ([file.id for file in second.data], second.has_more) == (ids[2:], False)
        assert [file.id async for file in client.files.list(purpose="batch")] == [ids[3], ids[1]]
        raw = await client.files.with_raw_response.list(limit=2)
        page = json.loads(raw.text)
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[4], ids[3])
        for query, param in (
            ("limit=0", "limit"),
            ("limit=x", "limit"),
            ("order=up", "order"),
            ("after=file-x", "after"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.files.list(extra_query=dict([query.split("=")]))
            assert refused.value.param == param


async def test_another_tenants_file_is_not_there() -> None:
    files = FakeFiles()
    theirs = files.add(CALLER.tenant, CONTENT).file_id
    async with client_of(files, OTHER_KEY) as client:
        for file_id in (theirs, "file-unknown", "file-" + "g" * 32):
            for call in (client.files.retrieve, client.files.delete, client.files.content):
                with pytest.raises(openai.NotFoundError):
                    await call(file_id)
        assert [file.id async for file in client.files.list()] == []
    assert list(files.stored) == [theirs]


async def test_without_storage_nothing_is_there_and_the_reason_is_said() -> None:
    async with (
        serve_http(fake_services(FakeDispatcher())) as url,
        httpx.AsyncClient(base_url=url, verify=False) as client,
    ):
        client.headers["authorization"] = f"Bearer {KEY}"
        paths = ("/v1/files", "/v1/files/file-1", "/v1/files/file-1/content", "/v1/batches", "/v1/batches/batch_1")
        answers = [await client.get(path) for path in paths]
        answers += [await client.post(path) for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1/cancel")]
        answers.append(await client.delete("/v1/files/file-1"))
    assert [answer.status_code for answer in answers] == [404] * 9
    assert all("operator has not configured batch storage" in answer.json()["error"]["message"] for answer in answers)


async def test_fields_may_stand_around_the_file() -> None:
    files = FakeFiles()
    async with plain_client_of(files) as client:
        before = await post(client, form(PURPOSE, FILE))
        behind = await post(client, form(FILE, PURPOSE))
        with_text_around = await post(client, b"\r\n" + form(PURPOSE, FILE) + b"the end")
    assert [answer.status_code for answer in (before, behind, with_text_around)] == [200] * 3
    assert [content for _, content in files.stored.values()] == [CONTENT] * 3


async def test_a_lifetime_may_stand_behind_the_file_as_in_openais_own_example() -> None:
    files = FakeFiles()
    async with plain_client_of(files) as client:
        answers = [await post(client, form(PURPOSE, *parts)) for parts in ((FILE, *LIFETIME), (*LIFETIME, FILE))]
    assert [answer.json()["expires_at"] for answer in answers] == [NOW_S + 3600] * 2


@pytest.mark.parametrize("filename", ["データ　集.jsonl", "a\u202fb", "\U0001f468\u200d\U0001f469", "%", "x" * 255])
async def test_a_name_may_be_in_any_language(filename: str) -> None:
    files = FakeFiles()
    head = f'Content-Disposition: form-data; name="file"; filename="{filename}"'.encode()
    async with client_of(files) as client, plain_client_of(files) as plain:
        assert (await post(plain, form(PURPOSE, (head, CONTENT)))).json()["filename"] == filename
        (file,) = (await client.files.list()).data
        assert (await client.files.content(file.id)).content == CONTENT


LIFETIME = (field("expires_after[anchor]", "created_at"), field("expires_after[seconds]", "3600"))
UNNAMED = (b"Content-Disposition: form-data", b"x")
HEADLESS = (b"X-Other: x", b"x")
NO_FILENAME = (b'Content-Disposition: form-data; name="file"', CONTENT)
BAD_NAME = (b'Content-Disposition: form-data; name="file"; filename="\xff"', CONTENT)
EMPTY_NAME = (b'Content-Disposition: form-data; name="file"; filename=""', CONTENT)
LONG_NAME = (b'Content-Disposition: form-data; name="file"; filename="' + b"x" * 256 + b'"', CONTENT)
TAB_NAME = (b'Content-Disposition: form-data; name="file"; filename="a\tb"', CONTENT)
OTHER_FILE = (b'Content-Disposition: form-data; name="other"; filename="x"', CONTENT)
BIG_HEAD = (FILE[0] + b"\r\nx-padding: " + b"x" * 600, CONTENT)
MANY_HEADS = (FILE[0] + b"\r\nx:" * 300, CONTENT)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form(PURPOSE), "no 'file'"),
        (form(), "no 'file'"),
        (b"", "ends early"),
        (form(PURPOSE, FILE, end=b""), "ends early"),
        (form(PURPOSE, FILE)[:-30], "ends early"),
        (form(FILE), "'purpose' must be 'batch'"),
        (form(FILE, field("purpose", "fine-tune")), "'purpose' must be 'batch'"),
        (form(field("purpose", "fine-tune"), FILE), "'purpose' must be 'batch'"),
        (form(PURPOSE, PURPOSE, FILE), "'purpose' is given twice"),
        (form(PURPOSE, FILE, FILE), "more than one 'file'"),
        (form(PURPOSE, OTHER_FILE), "Unrecognized request argument supplied: other"),
        (form(PURPOSE, NO_FILENAME), "no filename"),
        (form(PURPOSE, EMPTY_NAME), "1 to 255 characters"),
        (form(PURPOSE, LONG_NAME), "1 to 255 characters"),
        (form(PURPOSE, TAB_NAME), "control characters"),
        (form(PURPOSE, BAD_NAME), "UTF-8"),
        (form((PURPOSE[0], b"\xff"), FILE), "'purpose' is not UTF-8"),
        (form(UNNAMED, FILE), "has no name"),
        (form(HEADLESS, FILE), "has no name"),
        (form(LIFETIME[0], FILE, PURPOSE), "'expires_after[seconds]' must be a number"),
        (form(LIFETIME[1], FILE, PURPOSE), "'expires_after[anchor]' must be 'created_at'"),
        (form(field("expires_after[anchor]", "now"), FILE), "'expires_after[anchor]' must be 'created_at'"),
        (form(PURPOSE, FILE, LIFETIME[0], field("expires_after[seconds]", "3599")), "between 3600 and 2592000"),
        (form(PURPOSE, FILE, LIFETIME[0]), "'expires_after[seconds]' must be a number"),
        (form(PURPOSE, BIG_HEAD), "limit max_part_head_bytes"),
        (form(PURPOSE, MANY_HEADS), "limit max_part_head_bytes"),
        (form(field("purpose", "x" * 101), FILE), "limit max_field_bytes"),
        (form(*[field(str(number), "") for number in range(6)]), "limit max_form_parts"),
        (form(FILE, PURPOSE, *[UNNAMED] * 4), "has no name"),
        (form(FILE)[2:], "no valid multipart"),
        (form(PURPOSE, FILE).replace(b"\r\n", b"\n"), "no valid multipart"),
        (b"x" * 1000, "no valid multipart"),
    ],
)
async def test_a_hostile_form_is_refused_and_nothing_is_kept(body: bytes, said: str) -> None:
    files = FakeFiles()
    async with plain_client_of(files, http=LIMITS) as client:
        refused = await post(client, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
    assert said in refused.json()["error"]["message"]
    assert files.stored == {}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("application/json", "must be 'multipart/form-data'"),
        ("multipart/form-data", "names no boundary"),
        ("multipart/form-data; boundary=", "names no boundary"),
        ("multipart/form-data; boundary=" + "x" * 300, "too long"),
        ("multipart/form-data; boundary=limit; x=" + ";" * 5000, "limit max_part_head_bytes"),
        ("multipart/form-data; boundary=other", "no valid multipart"),
    ],
)
async def test_what_is_no_form_is_refused(kind: str, said: str) -> None:
    files = FakeFiles()
    async with plain_client_of(files) as client:
        refused = await post(client, form(PURPOSE, FILE), kind)
    assert (refused.status_code, files.stored) == (400, {})
    assert said in refused.json()["error"]["message"]


async def test_a_file_too_large_is_refused_with_its_limit() -> None:
    files = FakeFiles()
    limits = BatchLimits(max_file_bytes=100_000)
    exact, above = (form(PURPOSE, (FILE[0], b"x" * num_bytes)) for num_bytes in (100_000, 100_001))
    far_above = form(PURPOSE, (FILE[0], b"x" * 1_000_000))

    async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    async def endless_preamble() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"\r\n" * 25_000

    async with plain_client_of(files, limits=limits) as client:
        assert (await post(client, exact)).status_code == 200
        for body in (above, far_above, in_chunks(above), in_chunks(far_above), endless_preamble()):
            refused = await post(client, body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
            assert "100000 bytes are allowed (limit max_file_bytes)" in refused.json()["error"]["message"]
    assert [file.num_bytes for file, _ in files.stored.values()] == [100_000]


async def test_a_file_is_passed_on_before_it_has_come_whole() -> None:
    files = FakeFiles()
    body = form(PURPOSE, FILE)
    middle = body.index(b"custom_id") + 5

    async def halves() -> AsyncIterator[bytes]:
        yield body[:middle]
        async with asyncio.timeout(30):
            await files.taken.wait()
        assert not files.ended.is_set()
        yield body[middle:]

    async with plain_client_of(files) as client:
        assert (await post(client, halves())).status_code == 200
    assert [content for _, content in files.stored.values()] == [CONTENT]


async def test_a_client_that_stalls_is_given_up_and_nothing_is_kept() -> None:
    files = FakeFiles()

    async def stalls() -> AsyncIterator[bytes]:
        yield form(PURPOSE, FILE)[:-40]
        async with asyncio.timeout(30):
            await files.ended.wait()

    async with plain_client_of(files, http=replace(LIMITS, body_grace_s=0.3)) as client:
        refused = await post(client, stalls())
    assert (refused.status_code, refused.json()["error"]["code"]) == (408, "request_timeout")
    assert files.stored == {}


def test_a_client_may_lag_as_far_behind_its_rate_as_it_is_given() -> None:
    assert [Pace(60, 1000, 5).patience_s(num_bytes) for num_bytes in (0, 10_000, 10**9)] == [5, 15, 60]
    assert Pace(60, 0, 5).patience_s(0) == 60, "without a rate, only the time counts"


async def test_a_store_that_is_slow_is_not_the_clients_fault() -> None:
    class SlowFiles(FakeFiles):
        async def create(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            await asyncio.sleep(2 * limits.body_grace_s)
            return await super().create(*args, **kwargs)  # type: ignore[arg-type]

    limits, files = replace(LIMITS, body_grace_s=1.0), SlowFiles()
    async with plain_client_of(files, http=limits) as client:
        assert (await post(client, form(PURPOSE, FILE))).status_code == 200


async def test_nothing_is_kept_of_a_client_that_goes_midway() -> None:
    files = FakeFiles()
    services = batch_services(files, FakeBatches(files))
    async with serve_http(services) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 100000\r\n"
        writer.write(head.encode() + b"content-type: multipart/form-data; boundary=limit\r\n\r\n")
        writer.write(form(PURPOSE, FILE)[:-40])
        async with asyncio.timeout(30):
            await files.taken.wait()
            writer.transport.abort()
            await files.ended.wait()
    assert files.stored == {}


async def test_a_file_in_use_and_a_store_that_fails_are_answered() -> None:
    files = FakeFiles()
    file_id = files.add(CALLER.tenant, b"x" * 3000).file_id
    files.in_use.add(file_id)
    files.failure = RempartError(ErrorKind.UNAVAILABLE, "The storage does not answer.", retry_after_s=1)
    async with client_of(files) as client:
        with pytest.raises(openai.BadRequestError, match="A batch reads the file"):
            await client.files.delete(file_id)
        with pytest.raises(openai.InternalServerError) as failed:
            await client.files.content(file_id)
        assert failed.value.status_code == 503
    assert file_id in files.stored


async def test_a_download_that_breaks_off_does_not_look_whole() -> None:
    files = FakeFiles()
    file_id = files.add(CALLER.tenant, b"x" * 3000).file_id
    files.failure, files.fail_at = RempartError(ErrorKind.UNAVAILABLE, "The storage does not answer."), 2
    async with plain_client_of(files) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"/v1/files/{file_id}/content")


async def test_a_client_that_goes_ends_its_download() -> None:
    files = FakeFiles()
    file_id = files.add(CALLER.tenant, b"x" * 20_000_000).file_id
    async with plain_client_of(files) as client:
        async with client.stream("GET", f"/v1/files/{file_id}/content") as response:
            await anext(response.aiter_raw())
            assert not files.read_ended.is_set()
        async with asyncio.timeout(30):
            await files.read_ended.wait()


async def test_the_head_of_a_content_reads_nothing_of_it() -> None:
    files = FakeFiles()
    file_id = files.add(CALLER.tenant, CONTENT).file_id
    async with plain_client_of(files) as client:
        asked = await client.head(f"/v1/files/{file_id}/content")
    assert (asked.status_code, asked.headers["content-length"]) == (200, str(len(CONTENT)))
    assert not files.read_ended.is_set()


async def test_a_connection_may_be_used_again_as_soon_as_a_content_is_there() -> None:
    files = FakeFiles()
    files.end_s = 0.05
    file_id = files.add(CALLER.tenant, CONTENT).file_id
    async with plain_client_of(files) as client:
        for _ in range(3):
            assert (await client.get(f"/v1/files/{file_id}/content")).content == CONTENT
            assert (await client.get(f"/v1/files/{file_id}")).status_code == 200


async def test_a_large_file_comes_back_whole() -> None:
    files = FakeFiles()
    files.piece_bytes = MAX_PIECE_BYTES
    content = bytes(range(256)) * 10_000
    file_id = files.add(CALLER.tenant, content).file_id
    empty_id = files.add(CALLER.tenant, b"").file_id
    async with client_of(files) as client:
        assert (await client.files.content(file_id)).content == content
        assert (await client.files.content(empty_id)).content == b""


LIKE_A_BOUNDARY = st.sampled_from([b"\r", b"\n", b"-", b"--", b"\r\n--limi", b"\r\n--limit"[:-1] + b"s", b"x", b'"'])


@given(st.lists(LIKE_A_BOUNDARY, max_size=30), st.lists(st.integers(0, 400), max_size=8))
def test_a_form_says_the_same_however_it_is_cut(pieces: list[bytes], cuts: list[int]) -> None:
    content = b"".join(pieces)
    body = form(PURPOSE, (FILE[0], content))
    parser = FormParser(f"multipart/form-data; boundary={BOUNDARY}", LIMITS)
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    for start, end in itertools.pairwise(edges):
        parser.push(body[start:end])
    parts: dict[Part, bytes] = {}
    for event in parser.events:
        if isinstance(event, Part):
            parts[event] = b""
        elif isinstance(event, bytearray):
            parts[list(parts)[-1]] += event
    assert parts == {Part("purpose", None): b"batch", Part("file", "in.jsonl"): content}
    assert [event for event in parser.events if isinstance(event, Mark)][-1] is Mark.FORM_ENDS
