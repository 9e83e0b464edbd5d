"""Endpoints from the addresses of a name, such as a headless Service's; looked up again every few seconds.

DNS tells addresses and nothing else: a name without any and a name that cannot be looked up are hard to tell apart, so
neither takes endpoints away. An engine that is gone is found so by its session.
"""

import asyncio
import functools
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from rempart_platform.endpoints.discovery import DiscoveryObserver, DnsConfig
from rempart_platform.endpoints.source import EndpointSet, join_host_port

_logger = logging.getLogger(__name__)

_NO_ADDRESS = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}

Resolve = Callable[[str, int], Awaitable[frozenset[str]]]
"""(name, port) -> its addresses, as `host:port`. Raises OSError."""


class DnsSource:
    """The A and AAAA records of a name.

    Args:
        name: to look up.
        port: of every engine there.
        config: when.
        observer: told of every look-up.
        resolve: how; the system's resolver in production.
    """

    def __init__(
        self, name: str, port: int, config: DnsConfig, observer: DiscoveryObserver, resolve: Resolve | None = None
    ) -> None:
        self._name = name
        self._port = port
        self._config = config
        self._observer = observer
        self._resolve = resolve
        self.has_synced = False

    async def run(self, tell: Callable[[EndpointSet], None]) -> None:
        """Looks the name up until cancelled."""
        # A thread of its own: a resolver that hangs holds up nothing else, and look-ups do not pile up.
        thread = ThreadPoolExecutor(1, "dns")
        resolve = self._resolve or functools.partial(_ask_system, thread)
        try:
            while True:
                await self._look_up(resolve, tell)
                await asyncio.sleep(self._config.period_s)
        finally:
            thread.shutdown(wait=False)

    async def _look_up(self, resolve: Resolve, tell: Callable[[EndpointSet], None]) -> None:
        try:
            addresses = await resolve(self._name, self._port)
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno in _NO_ADDRESS and not self.has_synced:
                # Nothing is there yet, as for a Service whose engines are scaled to zero.
                addresses = frozenset()
            else:
                _logger.warning("cannot look up the engines", extra={"source": self._name, "reason": str(error)})
                self._observer.failed(self._name, "dns")
                return
        self.has_synced = True
        self._observer.synced(self._name, len(addresses), 0)
        tell(EndpointSet(addresses))


async def _ask_system(thread: ThreadPoolExecutor, name: str, port: int) -> frozenset[str]:
    """What the operating system answers."""
    ask = functools.partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(thread, ask)
    return frozenset(join_host_port(str(answer[4][0]), port) for answer in found)
