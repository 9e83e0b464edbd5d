"""A fake Kubernetes API for tests: a real HTTP server with EndpointSlices, Leases, and faults on demand.

A watch can lose deletes, answer 410, send nonsense, say nothing, be cut, or have its network swallow every packet.
"""

import asyncio
import ctypes
import fcntl
import json
import socket
import struct
import sys
import termios
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from aiohttp import web
from kubernetes_asyncio.client import ApiClient, Configuration

from rempart_platform.endpoints.source import EndpointSet

_SO_ATTACH_FILTER = 26
_BPF_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # "return 0": keep no byte of any packet

Manifest = dict[str, Any]


@dataclass(slots=True)
class KubernetesFaults:
    """What the API does wrong; may be changed while it runs."""

    forbids: bool = False
    """Answers 403 to everything."""
    answer: tuple[int, bytes] | None = None
    """A status and a body for everything."""
    loses_deletes: bool = False
    """Tells no watch of a delete."""
    expired: Literal["", "status", "event"] = ""
    """Answers each watch with 410, as its status or as its first event."""
    garbage: bytes = b""
    """The first line of each watch."""
    stalls: bool = False
    """Sends nothing on a watch, not even its end."""
    cuts: Literal["", "clean", "broken"] = ""
    """Ends each watch as soon as it began."""
    hangs: set[int] = field(default_factory=set)
    """Ports on which no request is answered."""


class FakeKubernetes:
    """Serves until left. Use as an async context manager."""

    def __init__(self) -> None:
        self.faults = KubernetesFaults()
        self.num_lists = 0
        self.num_watches = 0
        self.ports: list[int] = []
        self.leases: dict[str, Manifest] = {}
        self._slices: dict[str, Manifest] = {}
        self._events: list[tuple[int, Manifest]] = []
        self._version = 100
        self._num_requests: Counter[int] = Counter()  # by port
        self._watching: set[asyncio.Transport] = set()  # a connection each
        self._swallowed: set[asyncio.Transport] = set()
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    @property
    def num_watching(self) -> int:
        """Watches that are open."""
        return len(self._watching)

    def url(self, port: int | None = None) -> str:
        return f"http://127.0.0.1:{port or self.ports[0]}"

    def client(self, port: int | None = None) -> ApiClient:
        """To be closed by who asked for it."""
        return ApiClient(Configuration(host=self.url(port)))

    async def start(self) -> None:
        """Serves, on the ports it had before if it had some."""
        app = web.Application()
        slices = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        leases = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        app.router.add_get(slices, self._endpoint_slices)
        app.router.add_get(leases + "/{name}", self._read_lease)
        app.router.add_post(leases, self._create_lease)
        app.router.add_put(leases + "/{name}", self._replace_lease)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        for port in self.ports or (0,):
            await self.listen(port)

    async def listen(self, port: int = 0) -> int:
        """One more port of the same API."""
        assert self._runner is not None
        listener = socket.create_server(("127.0.0.1", port))
        await web.SockSite(self._runner, listener).start()
        bound: int = listener.getsockname()[1]
        if bound not in self.ports:
            self.ports.append(bound)
        return bound

    async def stop(self) -> None:
        """Goes away; what it knows stays."""
        if self._runner is not None:
            for connection in tuple(self._watching):
                connection.abort()
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> "FakeKubernetes":
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def put_slice(self, name: str, service: str, *endpoints: Manifest, **changes: Any) -> None:
        """Makes or changes a slice; `changes` replace its fields."""
        manifest = slice_manifest(name, service, *endpoints, **changes)
        kind = "MODIFIED" if name in self._slices else "ADDED"
        self._version += 1
        manifest["metadata"]["resourceVersion"] = str(self._version)
        self._slices[name] = manifest
        await self._tell(kind, manifest)

    async def delete_slice(self, name: str) -> None:
        self._version += 1
        manifest = self._slices.pop(name)
        manifest["metadata"]["resourceVersion"] = str(self._version)
        if not self.faults.loses_deletes:
            await self._tell("DELETED", manifest)

    async def wait_for(self, predicate: Callable[["FakeKubernetes"], bool], timeout_s: float = 30.0) -> None:
        """Waits until something holds. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: predicate(self))

    async def wait_for_requests(self, count: int, *ports: int) -> None:
        """Waits until so much more was asked on each of these ports; what is left hanging does not count."""
        wanted = {port: self._num_requests[port] + count for port in ports}
        await self.wait_for(lambda api: all(api._num_requests[port] >= wanted[port] for port in ports))

    async def cut(self) -> None:
        """Breaks the connections of all watches."""
        connections = frozenset(self._watching)
        for connection in connections:
            connection.abort()
        await self.wait_for(lambda api: not connections & api._watching)

    async def swallow_packets(self) -> None:
        """From now on nothing that the clients of the open watches send arrives, and nothing is sent to them.

        They get neither data nor an acknowledgement nor an end, as when the machine of the server loses its power.
        """
        for connection in tuple(self._watching):
            while _num_unacknowledged(connection) > 0:  # noqa: ASYNC110 - or the kernel would send it again and again
                await asyncio.sleep(0.01)
            program = ctypes.create_string_buffer(_BPF_DROP_ALL)
            connection.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program))
            )
        self._swallowed |= self._watching

    async def _tell(self, kind: str, manifest: Manifest) -> None:
        self._events.append((self._version, {"type": kind, "object": json.loads(json.dumps(manifest))}))
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _refuse(self, request: web.Request) -> web.Response | None:
        port = _connection_of(request).get_extra_info("sockname")[1]
        if port in self.faults.hangs:
            await asyncio.Event().wait()
        self._num_requests[port] += 1
        await self._notify()
        if self.faults.answer is not None:
            status, body = self.faults.answer
            return web.Response(status=status, body=body, content_type="text/html", charset="utf-8")
        if self.faults.forbids:
            return _status(403, "endpointslices is forbidden: User cannot list resource")
        return None

    async def _endpoint_slices(self, request: web.Request) -> web.StreamResponse:
        if (refusal := await self._refuse(request)) is not None:
            return refusal
        if "watch" in request.query:
            return await self._watch(request)
        self.num_lists += 1
        service = request.query["labelSelector"].removeprefix("kubernetes.io/service-name=")
        matching = [each for each in self._slices.values() if _service_of(each) == service]
        start, limit = int(request.query.get("continue", "0")), int(request.query.get("limit", "500"))
        metadata = {"resourceVersion": str(self._version)}
        if start + limit < len(matching):
            metadata["continue"] = str(start + limit)
        await self._notify()
        return web.json_response({"metadata": metadata, "items": matching[start : start + limit]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.num_watches += 1
        if self.faults.expired == "status":
            return _status(410, "too old resource version")
        response = web.StreamResponse()
        await response.prepare(request)
        connection = _connection_of(request)
        self._watching.add(connection)
        await self._notify()
        try:
            await self._send_events(request, response)
        finally:
            self._watching.discard(connection)
            await self._notify()
        return response

    async def _send_events(self, request: web.Request, response: web.StreamResponse) -> None:
        if self.faults.garbage:
            await response.write(self.faults.garbage + b"\n")
        if self.faults.expired == "event":
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await _write(response, {"type": "ERROR", "object": status})
            return
        if self.faults.cuts == "clean":
            return
        if self.faults.cuts == "broken":
            _connection_of(request).abort()
            return
        await self._follow(request, response)

    async def _follow(self, request: web.Request, response: web.StreamResponse) -> None:
        connection = _connection_of(request)
        service = request.query["labelSelector"].removeprefix("kubernetes.io/service-name=")
        known = int(request.query["resourceVersion"])
        num_sent = 0

        def has_more() -> bool:
            return len(self._events) > num_sent

        with suppress(TimeoutError):
            async with asyncio.timeout(int(request.query["timeoutSeconds"])):
                while True:
                    if not self.faults.stalls and connection not in self._swallowed:
                        for version, event in self._events[num_sent:]:
                            if version > known and _service_of(event["object"]) == service:
                                await _write(response, event)
                    num_sent = len(self._events)
                    async with self._changed:
                        await self._changed.wait_for(has_more)
        if self.faults.stalls:
            await asyncio.Event().wait()
        bookmark = {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(self._version)}}
        await _write(response, {"type": "BOOKMARK", "object": bookmark})

    async def _read_lease(self, request: web.Request) -> web.Response:
        if (refusal := await self._refuse(request)) is not None:
            return refusal
        lease = self.leases.get(request.match_info["name"])
        return web.json_response(lease) if lease is not None else _status(404, "not found")

    async def _create_lease(self, request: web.Request) -> web.Response:
        if (refusal := await self._refuse(request)) is not None:
            return refusal
        lease = await request.json()
        if lease["metadata"]["name"] in self.leases:
            return _status(409, "already exists")
        return await self._store(lease, 201)

    async def _replace_lease(self, request: web.Request) -> web.Response:
        if (refusal := await self._refuse(request)) is not None:
            return refusal
        lease = await request.json()
        stored = self.leases[request.match_info["name"]]
        if lease["metadata"]["resourceVersion"] != stored["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified")
        return await self._store(lease, 200)

    async def _store(self, lease: Manifest, status: int) -> web.Response:
        self._version += 1
        lease["metadata"]["resourceVersion"] = str(self._version)
        self.leases[lease["metadata"]["name"]] = lease
        await self._notify()
        return web.json_response(lease, status=status)


@dataclass(slots=True)
class Told:
    """Waits for what a source tells; its observer too."""

    sets: list[EndpointSet] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_synced: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, told: EndpointSet) -> None:
        self.sets.append(told)
        self._changed.set()

    def synced(self, source: str, num_serving: int, num_terminating: int) -> None:
        self.num_synced += 1

    def failed(self, source: str, reason: str) -> None:
        self.failures.append(reason)
        self._changed.set()

    async def wait_for(self, predicate: Callable[["Told"], bool], timeout_s: float = 30.0) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not predicate(self):
                self._changed.clear()
                await self._changed.wait()

    async def wait_for_set(
        self, serving: Sequence[str], terminating: Sequence[str] = (), timeout_s: float = 30.0
    ) -> None:
        """Waits until the last set is this one."""
        wanted = EndpointSet(frozenset(serving), frozenset(terminating))
        await self.wait_for(lambda told: bool(told.sets) and told.sets[-1] == wanted, timeout_s)


def endpoint(address: str, **conditions: bool | None) -> Manifest:
    """An endpoint of a slice, ready unless told otherwise; the pod behind it has the name of the address."""
    conditions = {"ready": True, "serving": True, "terminating": False, **conditions}
    return {"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "uid": f"uid-{address}"}}


def slice_manifest(name: str, service: str, *endpoints: Manifest, **changes: Any) -> Manifest:
    """An EndpointSlice whose port `grpc` is 50051."""
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": list(endpoints) or None,
        "ports": [
            {"name": "metrics", "port": 9100, "protocol": "TCP"},
            {"name": "grpc", "port": 50051, "protocol": "TCP"},
        ],
        **changes,
    }


def _service_of(manifest: Mapping[str, Any]) -> object:
    return manifest["metadata"]["labels"]["kubernetes.io/service-name"]


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


async def _write(response: web.StreamResponse, event: Manifest) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


def _num_unacknowledged(connection: asyncio.Transport) -> int:
    number = fcntl.ioctl(connection.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(number, sys.byteorder)


def _connection_of(request: web.Request) -> asyncio.Transport:
    assert isinstance(request.transport, asyncio.Transport)
    return request.transport
