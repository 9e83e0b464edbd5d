"""Segments in object storage.

    chains/<router>-<16 hex>/2026-11-25/0000000000000000.jsonl         number of its first record
    beginnings/<router>-<16 hex>/0000000000000007.jsonl                the same, of the first that is kept

They are made, never changed. A segment that is there already with the same bytes was put by an attempt whose answer
was lost.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError

from rempart_platform.audit.beginning import (
    WHOLE,
    BadBeginningError,
    Beginning,
    decode_beginning,
    encode_beginning,
)
from rempart_platform.audit.chain import Segment
from rempart_platform.audit.check import BadChainError
from rempart_platform.audit.signing import Signer
from rempart_platform.object_store import ObjectStore, sync_to_disk

STORE_ERRORS = (BaseError, OSError, TimeoutError)
"""What storage raises when it cannot serve."""
_ROOT = "chains"
_BEGINNINGS = "beginnings"
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

    async def segments(self, chain: str, days: Iterable[str], *, first: int = 0) -> AsyncIterator[tuple[str, bytes]]:
        """Paths and bytes of the segments of these days, in order. No more than a day's paths are held at a time.

        Those before the record `first` are left out.
        """
        for day in days:
            paths = await self._paths(f"{_ROOT}/{chain}/{day}")
            async for segment in self._read_ahead([path for path in paths if not _is_before(path, first)]):
                yield segment

    async def remove(self, chain: str, days: Iterable[str], *, before: int) -> None:
        """Removes the segments of these days that begin before that record. Again is harmless."""
        for day in days:
            await self._delete(path for path in await self._paths(f"{_ROOT}/{chain}/{day}") if _is_before(path, before))

    async def beginning(self, chain: str, public_key: bytes | None = None) -> Beginning:
        """Where what is kept of a chain begins, signed with that key if one is given. Raises BadChainError."""
        found = await self._latest_beginning(chain)
        if found is None:
            return WHOLE
        path, data = found
        try:
            return decode_beginning(chain, data, public_key)
        except BadBeginningError as error:
            raise BadChainError(f"chain {chain}: of its beginning, {path}: {error}") from None

    async def put_beginning(self, chain: str, beginning: Beginning, signer: Signer | None) -> None:
        """Keeps it, and removes those before it. Of two at the same time, the later beginning holds."""
        path = f"{_BEGINNINGS}/{chain}/{beginning.first:016d}.jsonl"
        await self._create(path, encode_beginning(chain, beginning, signer))
        paths = await self._paths(f"{_BEGINNINGS}/{chain}")
        await self._delete(each for each in paths if _is_before(each, beginning.first))

    async def _latest_beginning(self, chain: str) -> tuple[str, bytes] | None:
        async def read() -> tuple[str, bytes] | None:
            paths = await self._paths(f"{_BEGINNINGS}/{chain}")
            return (paths[-1], await self.get(paths[-1])) if paths else None

        try:
            return await read()
        except NotFoundError:  # a later one took its place
            return await read()

    async def _paths(self, prefix: str) -> list[str]:
        return sorted(each["path"] for each in await obstore.list(self._store, prefix).collect_async())

    async def _delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with suppress(NotFoundError, FileNotFoundError):  # another router removes them too
                await obstore.delete_async(self._store, path)

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


def _is_before(path: str, record: int) -> bool:
    """Of a segment or a beginning; what has no number is neither, and is never before anything."""
    number = path.rpartition("/")[2].partition(".")[0]
    return number.isdecimal() and int(number) < record
