"""apis/http_limits.py, http_body.py and ../json_guard.py, over raw sockets and with small timeouts."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.testing import KEY, MODEL, FakeDispatcher, fake_services, serve_http
from rempart_platform.errors import RempartError
from rempart_platform.json_guard import check_json_shape

LIMITS = HttpLimits(
    max_connections=3,
    max_head_bytes=2048,
    head_timeout_s=30,
    idle_timeout_s=30,
    body_timeout_s=30,
    min_body_bytes_per_s=1000,
    body_grace_s=30,
    discard_timeout_s=0.2,
    write_timeout_s=30,
)
"""Of times that can hurt a client, each test shortens the one that it is about: a busy machine meets no other."""


class Connection:
    """A client that does exactly what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def drip(self, data: bytes, every_s: float) -> None:
        """One byte at a time until the server has had enough."""
        try:
            for byte in data:
                await self.send(bytes([byte]))
                await asyncio.sleep(every_s)
        except ConnectionError:
            return

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        try:
            async with asyncio.timeout(20):
                return await self.reader.read()
        except ConnectionError:
            return b""


@asynccontextmanager
async def server(
    dispatcher: FakeDispatcher | None = None, limits: HttpLimits = LIMITS
) -> AsyncIterator[tuple[str, int]]:
    async with serve_http(fake_services(dispatcher or FakeDispatcher(), http=limits)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


@asynccontextmanager
async def connect(address: tuple[str, int], receive_buffer: int | None = None) -> AsyncIterator[Connection]:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, address)
    # The reader's limit lets the socket fill up when nobody reads.
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def request(body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        "host: x",
        f"authorization: Bearer {KEY}",
        "content-type: application/json",
        f"content-length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def completion(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x", **fields}).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_a_silent_connection_is_closed() -> None:
    started = time.monotonic()
    async with server(limits=replace(LIMITS, head_timeout_s=0.3)) as address, connect(address) as client:
        answer = await client.rest()
    assert time.monotonic() - started >= 0.3
    assert status_of(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def assert_cut_off(answer: bytes, status: int) -> None:
    """The answer is lost when a byte of ours crosses it; that the connection ended, the caller has seen."""
    assert not answer or status_of(answer) == status


async def test_dripped_headers_are_cut_off() -> None:
    limits = replace(LIMITS, head_timeout_s=0.3)
    async with server(limits=limits) as address, connect(address) as client, asyncio.TaskGroup() as tasks:
        dripping = tasks.create_task(client.drip(request() * 3, 0.01))
        answer = await client.rest()
        dripping.cancel()
    assert_cut_off(answer, 408)


async def test_empty_lines_do_not_keep_an_idle_connection() -> None:
    async with server(limits=replace(LIMITS, head_timeout_s=2)) as address, connect(address) as client:
        await client.send(request(completion()))
        await client.reader.readuntil(b"}}}")
        async with asyncio.TaskGroup() as tasks:
            dripping = tasks.create_task(client.drip(b"\r\n" * 5000, 0.02))
            answer = await client.rest()
            dripping.cancel()
    assert_cut_off(answer, 408)


async def test_headers_too_large_are_refused() -> None:
    async with server() as address, connect(address) as client:
        await client.send(b"GET /health HTTP/1.1\r\nhost: x\r\nx-large: " + b"a" * 3000)
        answer = await client.rest()
    assert status_of(answer) == 413
    assert b"limit max_head_bytes" in answer


async def test_an_idle_connection_is_closed_and_one_in_use_is_not() -> None:
    async with server(limits=replace(LIMITS, idle_timeout_s=2)) as address, connect(address) as client:
        for _ in range(2):
            await client.send(request(completion()))
            assert b"200 OK" in await client.reader.readuntil(b"}}}")
            await asyncio.sleep(1.1)  # together more than may lie between two requests
        assert await client.rest() == b""


async def test_a_body_that_never_comes_is_given_up() -> None:
    async with server(limits=replace(LIMITS, body_grace_s=0.3)) as address, connect(address) as client:
        await client.send(request(length=1000))
        answer = await client.rest()
    assert status_of(answer) == 408
    assert b"connection: close" in answer


async def test_a_dripped_body_is_cut_off() -> None:
    dispatcher = FakeDispatcher()
    async with server(dispatcher, replace(LIMITS, body_grace_s=0.3)) as address, connect(address) as client:
        await client.send(request(length=1000))
        async with asyncio.TaskGroup() as tasks:
            dripping = tasks.create_task(client.drip(b"x" * 999, 0.02))
            answer = await client.rest()
            dripping.cancel()
    assert_cut_off(answer, 408)
    assert not dispatcher.requests


async def test_a_refused_request_cannot_hold_its_connection_with_a_body() -> None:
    async with server() as address, connect(address) as client:
        await client.send(request(length=1_000_000).replace(KEY.encode(), b"rk_wrong"))
        async with asyncio.TaskGroup() as tasks:
            dripping = tasks.create_task(client.drip(b"x" * 1000, 0.02))
            answer = await client.rest()
            dripping.cancel()
    assert_cut_off(answer, 401)


async def test_a_client_that_asks_before_sending_is_not_told_to_go_on() -> None:
    async with server() as address, connect(address) as client:
        head = request(b"", "expect: 100-continue", length=10**9)
        await client.send(head)
        answer = await client.rest()
    assert status_of(answer) == 413
    assert b"limit max_body_bytes" in answer
    assert b"100 Continue" not in answer


async def test_more_connections_than_allowed_are_turned_away() -> None:
    async with server() as address:
        async with connect(address), connect(address), connect(address), connect(address) as fourth:
            assert status_of(await fourth.rest()) == 503
        async with asyncio.timeout(20):
            while await status_of_one(address) != 200:  # noqa: ASYNC110 - until it has seen the others go
                await asyncio.sleep(0.01)


async def status_of_one(address: tuple[str, int]) -> int:
    async with connect(address) as client:
        await client.send(request(completion(), "connection: close"))
        return status_of(await client.rest())


async def test_requests_are_not_piled_up_behind_one_that_runs() -> None:
    dispatcher = FakeDispatcher(pause_at=0)
    async with server(dispatcher) as address, connect(address) as client:
        await client.send(request(completion()))
        await dispatcher.started.wait()
        await client.send(request(completion()))
        assert await client.rest() == b""
        async with asyncio.timeout(20):
            await dispatcher.ended.wait()
    assert len(dispatcher.requests) == 1


async def test_a_client_that_does_not_read_its_stream_is_cut() -> None:
    dispatcher = FakeDispatcher(texts=["x" * 1000], num_repeats=100)
    limits = replace(LIMITS, write_timeout_s=0.3)
    async with server(dispatcher, limits) as address, connect(address, receive_buffer=4096) as client:
        await client.send(request(completion(stream=True)))
        async with asyncio.timeout(30):
            await dispatcher.ended.wait()
    # What fits into both socket buffers and ours, not the 20 MB of the whole answer.
    assert dispatcher.num_delivered < 5000


async def test_an_answer_that_nobody_takes_does_not_keep_its_connection() -> None:
    dispatcher = FakeDispatcher(texts=["x" * 1000], num_repeats=1000, delta_chars=1000)
    limits = replace(LIMITS, write_timeout_s=0.3)
    async with server(dispatcher, limits) as address, connect(address, receive_buffer=4096) as client:
        await client.send(request(completion()))
        await dispatcher.ended.wait()
        await asyncio.sleep(1)
        received = await client.rest()
    assert 0 < len(received) < 1_000_000


async def test_what_is_no_http_is_answered_in_json() -> None:
    async with server() as address, connect(address) as client:
        await client.send(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await client.rest()
    assert status_of(answer) == 400
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_value"


async def test_a_reset_in_mid_stream_ends_the_generation() -> None:
    dispatcher = FakeDispatcher(texts=["ab"], pause_at=1)
    async with server(dispatcher) as address, connect(address) as client:
        await client.send(request(completion(stream=True)))
        await client.reader.readuntil(b"\n\n")
        client.writer.transport.abort()
        async with asyncio.timeout(20):
            await dispatcher.ended.wait()
    assert dispatcher.num_delivered == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def count(value: object) -> int:
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    return 1 + sum(map(count, value.values())) if isinstance(value, dict) else 1


def depth(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 1 + max(map(depth, value.values()), default=0) if isinstance(value, dict) else 0


@given(JSON, st.integers(1, 20), st.integers(1, 5))
def test_nodes_and_depth_are_judged_whatever_the_strings_hold(value: object, max_nodes: int, max_depth: int) -> None:
    data = json.dumps(value, ensure_ascii=False).encode()
    if count(value) > max_nodes or depth(value) > max_depth:
        with pytest.raises(RempartError, match="JSON"):
            check_json_shape(data, max_nodes=max_nodes, max_depth=max_depth)
    elif 2 * count(value) <= max_nodes:  # counting is generous by an empty container at most
        check_json_shape(data, max_nodes=max_nodes, max_depth=max_depth)


def test_hostile_json_is_judged_fast() -> None:
    hostile = (b"[" + b"{}," * 1_300_000 + b"{}]", b'["' + b'\\"' * 2_000_000 + b'"]', b'["' + b"[" * 4_000_000 + b'"]')
    for data in (*hostile, b"[" * 4_000_000, b'""' * 2_000_000):
        started = time.thread_time()  # of work, which a busy machine does not add to
        with suppress(RempartError):
            check_json_shape(data, max_nodes=200_000, max_depth=64)
        assert time.thread_time() - started < 0.5
