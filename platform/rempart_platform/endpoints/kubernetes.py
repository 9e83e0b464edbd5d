"""Endpoints from the EndpointSlices of Services: list, then watch, and never trust the watch alone.

run():  list everything ──► watch from there ──► its time is over ──► watch on ──► ... ──► relist_s is over
            ▲                    │ 410, an error, nonsense, silence                             │
            ├──── backoff ◄──────┘                                                              │
            └───────────────────────────────────────────────────────────────────────────────────┘

Whatever fails, the set that was read last stands; a delete that the watch lost is found by the next list.
"""

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from kubernetes_asyncio.client import ApiClient, DiscoveryV1Api

from rempart_platform.cluster.kubernetes_api import KUBERNETES_AWAY, KubernetesError, reason_of
from rempart_platform.endpoints.backoff import jittered_backoff_s
from rempart_platform.endpoints.discovery import DiscoveryObserver, KubernetesConfig
from rempart_platform.endpoints.endpoint_slices import EndpointSlice, endpoint_set, parse_event, parse_list
from rempart_platform.endpoints.service_name import ServiceName
from rempart_platform.endpoints.source import EndpointSet

_logger = logging.getLogger(__name__)

_PAGE = 500
_LABEL = "kubernetes.io/service-name"


class ServiceSource:
    """The endpoints of one Service.

    Args:
        client: of the Kubernetes API; shared, and closed by its owner.
        service: whose endpoints.
        config: times.
        observer: told of every success and failure.
        rng: jitters.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: ApiClient,
        service: ServiceName,
        config: KubernetesConfig,
        observer: DiscoveryObserver,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = DiscoveryV1Api(client)
        self._service = service
        self._config = config
        self._observer = observer
        self._rng = rng
        self._clock = clock
        self._slices: dict[str, EndpointSlice] = {}
        self._version = ""  # resourceVersion: what of the slices' history is known
        self._attempts = 0
        self._failure = ""  # the reason of the last failure that was logged
        self.has_synced = False

    async def run(self, tell: Callable[[EndpointSet], None]) -> None:
        """Lists and watches until cancelled."""
        while True:
            try:
                await self._list(tell)
                relist_at_s = self._clock() + self._config.relist_s
                while (left_s := relist_at_s - self._clock()) > 0:
                    await self._watch(tell, min(left_s, self._config.watch_s * self._rng.uniform(0.8, 1.0)))
            except KUBERNETES_AWAY as error:
                self._failed(error)
                await self._pause()

    async def _list(self, tell: Callable[[EndpointSet], None]) -> None:
        slices: dict[str, EndpointSlice] = {}
        page_token: str | None = None
        while page_token != "":
            async with asyncio.timeout(self._config.request_timeout_s):
                body = await self._read_page(page_token)
            page = parse_list(body)
            slices.update((each.metadata.name, each) for each in page.items or ())
            page_token = page.metadata.next_page
        self._slices, self._version = slices, page.metadata.resource_version
        self._synced(tell)

    async def _read_page(self, page_token: str | None) -> bytes:
        page = {} if page_token is None else {"_continue": page_token}
        async with await self._request(limit=_PAGE, **page) as response:
            return await response.read()

    async def _watch(self, tell: Callable[[EndpointSet], None], timeout_s: float) -> None:
        """Follows changes until the server ends the watch, which it is asked to do after that time."""
        began_s = self._clock()
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                response = await self._request(
                    watch=True,
                    resource_version=self._version,
                    allow_watch_bookmarks=True,
                    timeout_seconds=max(round(timeout_s), 1),
                    _request_timeout=aiohttp.ClientTimeout(sock_read=timeout_s + self._config.silence_s),
                )
            async with response:
                _keep_alive(response, self._config.keepalive_s)
                while line := await response.content.readline():
                    self._take(line)
                    self._synced(tell)
        except HttpProcessingError as error:  # a line without an end, among others
            raise KubernetesError("garbage", str(error)) from error
        finally:
            lived_s = self._clock() - began_s
            if lived_s >= min(timeout_s, self._config.backoff_max_s):
                self._attempts = 0
        self._synced(tell)
        if lived_s < timeout_s / 2:  # a server that ends every watch at once must not be asked without a pause
            await self._pause()

    async def _request(self, **query: Any) -> aiohttp.ClientResponse:
        selector = f"{_LABEL}={self._service.name}"
        answer: object = await self._api.list_namespaced_endpoint_slice(
            self._service.namespace, label_selector=selector, _preload_content=False, **query
        )
        assert isinstance(answer, aiohttp.ClientResponse)  # so it is without preloading, whatever its type says
        if answer.status == 200:
            return answer
        async with answer:
            raise KubernetesError(str(answer.status), (await answer.text(errors="replace"))[:500])

    def _take(self, line: bytes) -> None:
        kind, changed = parse_event(line)
        if kind == "DELETED":
            self._slices.pop(changed.metadata.name, None)
        elif kind != "BOOKMARK":
            self._slices[changed.metadata.name] = changed
        self._version = changed.metadata.resource_version or self._version

    def _synced(self, tell: Callable[[EndpointSet], None]) -> None:
        current = endpoint_set(self._slices.values(), self._service.port_name)
        self.has_synced, self._failure = True, ""
        self._observer.synced(str(self._service), len(current.serving), len(current.terminating))
        tell(current)

    def _failed(self, error: BaseException) -> None:
        reason = reason_of(error)
        self._observer.failed(str(self._service), reason)
        if reason == self._failure:  # it is told once; the counter goes on
            return
        self._failure = reason
        service = str(self._service)
        if reason in ("401", "403"):
            text = (
                "Kubernetes lets this router not read a Service's endpoints: its service account needs get, list and "
                "watch on endpointslices of discovery.k8s.io in that namespace"
            )
            _logger.error(text, extra={"service": service, "reason": str(error)})
        else:
            _logger.warning("cannot follow a Service's endpoints", extra={"service": service, "reason": str(error)})

    async def _pause(self) -> None:
        config = self._config
        await asyncio.sleep(
            jittered_backoff_s(self._attempts, config.backoff_initial_s, config.backoff_max_s, self._rng)
        )
        self._attempts += 1


def _keep_alive(response: aiohttp.ClientResponse, period_s: float) -> None:
    """Has the kernel ask whether the other end is still there: a silent watch sends nothing that would tell."""
    transport = response.connection.transport if response.connection is not None else None
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is None or not hasattr(socket, "TCP_KEEPIDLE"):
        return
    seconds = max(round(period_s), 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
