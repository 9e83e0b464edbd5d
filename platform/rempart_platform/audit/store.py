"""Segments in object storage.

    chains/<router>-<16 hex>/2026-11-25/0000000000000000.jsonl         number of its first record

They are made, never changed. A segment that is there already with the same bytes was put by an attempt whose answer
was lost.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from rempart_platform.audit.chain import Segment
from rempart_platform.object_store import ObjectStore, sync_to_disk

STORE_ERRORS = (BaseError, OSError, TimeoutError)
"""What storage raises when it cannot serve."""
_ROOT = "chains"
_MAX_SEGMENT_BYTES = 1 << 28
_READ_AHEAD = 16


class ForeignSegmentError(OSError):
    """In the place of a segment lies something else."""


class SegmentStore:
    """Puts and reads segments.

    Raises:
        BaseError, OSError: the storage cannot serve.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def put(self, segment: Segment) -> None:
        """Keeps it, also beyond a loss of power. Again is harmless."""
        await self._create(segment.path, segment.data)

    async def _create(self, path: str, data: bytes) -> None:
        try:
            await obstore.put_async(self._store, path, data, mode="create")
        except AlreadyExistsError:
            if await self.get(path) != data:
                raise ForeignSegmentError(f"{path} exists and is another") from None
        # Also what was there already: an attempt may have ended between the two.
        await asyncio.to_thread(sync_to_disk, self._store, path)

    async def get(self, path: str) -> bytes:
        """Raises ForeignSegmentError for an object too large to be a segment."""
        got = await obstore.get_async(self._store, path)
        if got.meta["size"] > _MAX_SEGMENT_BYTES:
            raise ForeignSegmentError(f"{path} has {got.meta['size']} bytes, which no segment has")
        return bytes(await got.bytes_async())

    async def chains(self) -> list[str]:
        """Names of all chains, sorted."""
        return await self._folders(_ROOT)

    async def days(self, chain: str) -> list[str]:
        """UTC days of which a chain has segments, sorted."""
        return await self._folders(f"{_ROOT}/{chain}")

    async def segments(self, chain: str, days: Iterable[str]) -> AsyncIterator[tuple[str, bytes]]:
        """Paths and bytes of the segments of these days, in order. No more than a day's paths are held at a time."""
        for day in days:
            listed = await obstore.list(self._store, f"{_ROOT}/{chain}/{day}").collect_async()
            async for segment in self._read_ahead(sorted(each["path"] for each in listed)):
                yield segment

    async def _read_ahead(self, paths: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
        reading: deque[tuple[str, asyncio.Task[bytes]]] = deque()
        try:
            for path in paths:
                reading.append((path, asyncio.create_task(self.get(path))))
                if len(reading) == _READ_AHEAD:
                    first, task = reading.popleft()
                    yield first, await task
            while reading:
                first, task = reading.popleft()
                yield first, await task
        finally:
            for _, task in reading:
                task.cancel()
            await asyncio.gather(*(task for _, task in reading), return_exceptions=True)

    async def _folders(self, prefix: str) -> list[str]:
        listed = await obstore.list_with_delimiter_async(self._store, prefix)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in listed["common_prefixes"])
