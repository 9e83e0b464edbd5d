"""Takes what waits to the store, segment by segment, for as long as the router runs.

buffer ─► ChainWriter ─► store ─► head to Redis ─► those who wait for it go on
                          │
                          └─ away: the same bytes again, later
"""

import asyncio
import logging
from typing import Protocol

from rempart_platform.audit.buffer import AuditBuffer
from rempart_platform.audit.chain import ChainWriter, Segment
from rempart_platform.audit.check import Head
from rempart_platform.audit.store import STORE_ERRORS
from rempart_platform.audit.values import AuditConfig, Entry
from rempart_platform.errors import RempartError

_logger = logging.getLogger(__name__)
_MANY_RECORDS = 256
"""From here on, hashing goes to a thread: it would hold up the event loop for more than a millisecond."""


class Segments(Protocol):
    """What sealing needs of storage; `SegmentStore` in production."""

    async def put(self, segment: Segment) -> None:
        """Keeps it. Again is harmless. Raises one of STORE_ERRORS."""


class Heads(Protocol):
    """What sealing needs of Redis; `HeadStore` in production."""

    async def write(self, chain: str, head: Head) -> None:
        """Raises RempartError when Redis does not answer."""


class SealObserver(Protocol):
    """Told how it goes; `AuditMetrics` in production."""

    def sealed(self, entries: list[Entry]) -> None: ...

    def seal_failed(self) -> None: ...


class Sealer:
    """One chain's only writer."""

    def __init__(
        self,
        buffer: AuditBuffer,
        writer: ChainWriter,
        segments: Segments,
        heads: Heads,
        config: AuditConfig,
        observer: SealObserver,
    ) -> None:
        self._buffer = buffer
        self._writer = writer
        self._segments = segments
        self._heads = heads
        self._config = config
        self._observer = observer
        self._is_stopping = False
        self._unsealed: tuple[list[Entry], Segment] | None = None
        """Its place in the chain is taken, so it has to be put before any other."""

    async def run(self) -> None:
        """Seals until `stop`; then once more, with the record that says so, until the store has taken it."""
        await self._write_head(Head())
        wait_s = self._config.seal_s
        backoff_s = self._config.backoff_s
        while not self._is_stopping:
            await self._buffer.wait_for_work(wait_s)
            if await self._seal_all():
                wait_s, backoff_s = self._config.seal_s, self._config.backoff_s
            else:
                wait_s, backoff_s = backoff_s, min(2 * backoff_s, self._config.max_backoff_s)
        await self._seal_the_rest()
        self._buffer.end()
        await self._seal_the_rest()

    def stop(self) -> None:
        """Lets `run` end."""
        self._is_stopping = True
        self._buffer.wake()

    async def _seal_the_rest(self) -> None:
        while not await self._seal_all():
            await self._buffer.wait_for_work(self._config.backoff_s)

    async def _seal_all(self) -> bool:
        """Seals whatever waits; False as soon as the store does not take it."""
        while True:
            if self._unsealed is None:
                entries = self._buffer.take()
                if not entries:
                    return True
                self._unsealed = entries, await self._chained(entries)
            entries, segment = self._unsealed
            if not await self._put(segment):
                return False
            self._unsealed = None
            await self._write_head(Head(segment.last, segment.link))
            self._observer.sealed(entries)
            self._buffer.sealed()

    async def _chained(self, entries: list[Entry]) -> Segment:
        if len(entries) < _MANY_RECORDS:
            return self._writer.seal(entries)
        return await asyncio.to_thread(self._writer.seal, entries)

    async def _put(self, segment: Segment) -> bool:
        try:
            async with asyncio.timeout(self._config.put_timeout_s):
                await self._segments.put(segment)
        except STORE_ERRORS as error:
            fields = {"segment": segment.path, "waiting": len(self._buffer), "error": repr(error)}
            _logger.warning("the audit log could not be written", extra={"fields": fields})
            self._observer.seal_failed()
            return False
        return True

    async def _write_head(self, head: Head) -> None:
        try:
            await self._heads.write(self._writer.chain, head)
        except RempartError:
            # The next head says the same of all that came before.
            fields = {"chain": self._writer.chain, "last": head.last}
            _logger.warning("Redis does not know how far the audit log is", extra={"fields": fields})
