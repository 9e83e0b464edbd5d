"""The issuer's keys as they were last seen, renewed in the background and when a token names another.

every refresh_s ──────────────────┐
a token with an unknown key ──────┴─► fetch, one at a time, at most one in min_refresh_s
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import jwt

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.oidc.fetch import IssuerError, fetch_keys
from rempart_platform.oidc.values import OidcConfig

_logger = logging.getLogger(__name__)


class KeyRing:
    """Made by `open_key_ring`.

    Args:
        config: how old keys may be, and how often they are fetched.
        fetch: fetches them; raises IssuerError.
        clock: monotonic seconds.
    """

    def __init__(
        self, config: OidcConfig, fetch: Callable[[], Awaitable[Mapping[str, jwt.PyJWK]]], clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._fetch = fetch
        self._clock = clock
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_s = -math.inf
        self._tried_s = -math.inf
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str) -> jwt.PyJWK | None:
        """The key of that name, "" for one without; None when the issuer has none such.

        Raises:
            RempartError: UNAVAILABLE: the issuer has been away for so long that its keys may have been withdrawn.
        """
        if kid not in self._keys or self._is_stale():
            await self._refresh()
        if self._is_stale():
            raise RempartError(
                ErrorKind.UNAVAILABLE,
                "The service cannot check tokens at the moment.",
                retry_after_s=self._config.min_refresh_s,
            )
        return self._keys.get(kid)

    async def run(self) -> None:
        """Renews the keys until cancelled."""
        while True:
            await self._refresh()
            is_fresh = self._fetched_s >= self._tried_s
            await asyncio.sleep(self._config.refresh_s if is_fresh else self._config.min_refresh_s)

    async def close(self) -> None:
        """Ends a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    def _is_stale(self) -> bool:
        return self._clock() - self._fetched_s > self._config.max_key_age_s

    async def _refresh(self) -> None:
        """Waits for a fetch, unless there was one a moment ago."""
        if self._fetching is None and self._clock() - self._tried_s >= self._config.min_refresh_s:
            self._tried_s = self._clock()
            self._fetching = asyncio.create_task(self._fetch_once())
        if self._fetching is not None:
            # Who waits may leave; the others, and those to come, want the keys all the same.
            await asyncio.shield(self._fetching)

    async def _fetch_once(self) -> None:
        try:
            self._keys = await self._fetch()
            self._fetched_s = self._clock()
        except IssuerError as error:
            fields = {"issuer": self._config.issuer, "error": str(error)}
            _logger.warning("the issuer's keys could not be fetched", extra={"fields": fields})
        finally:
            self._fetching = None


@asynccontextmanager
async def open_key_ring(config: OidcConfig, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[KeyRing]:
    """A key ring with the task that renews it. The issuer may be away: tokens are refused until it is there."""
    ring = KeyRing(config, lambda: fetch_keys(config), clock)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(ring.run())
        try:
            yield ring
        finally:
            running.cancel()
            await ring.close()
