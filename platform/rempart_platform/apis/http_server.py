"""uvicorn under our limits, as one part of a process that has others."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from rempart_platform.apis.http_limits import HttpLimits, LimitedHttpProtocol


class HttpServer(uvicorn.Server):
    """`await serve([listening socket])` until `should_exit` is set; then requests may go on for the drain timeout.

    Args:
        app: what to serve.
        limits: of its connections.
        drain_timeout_s: None waits for the last request however long it takes.
    """

    def __init__(self, app: ASGIApp, limits: HttpLimits, *, drain_timeout_s: int | None = None) -> None:
        protocol: Callable[..., asyncio.Protocol] = partial(LimitedHttpProtocol, limits=limits)
        config = uvicorn.Config(
            app,
            http=protocol,  # type: ignore[arg-type] # called like the class it makes
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks for the client's address
            timeout_keep_alive=limits.idle_timeout_s,
            timeout_graceful_shutdown=drain_timeout_s,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, which drains all of its parts."""
        yield
