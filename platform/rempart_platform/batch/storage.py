"""What batch jobs keep in object storage, and our errors when it does not answer.

files/<tenant>/<file>                    inputs and results
jobs/<tenant>/<job>/plan                 how the input is cut; the first one counts
jobs/<tenant>/<job>/shards/<number>      answers of a shard; the first one counts
jobs/<tenant>/<job>/lines/<number>       the answer of a line that is large, until its shard is stored
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.object_store import ObjectStore, remove_unfinished, sync_to_disk

_RETRY_AFTER_S = 2.0
_PIECE_BYTES = 1024 * 1024
_PARTS_IN_FLIGHT = 2
"""Of 5 MiB each, in memory until the storage has them: however slow it is, an upload holds no more."""


class MissingObjectError(Exception):
    """There is no such object."""


class BatchStorage:
    """Objects by path. What is kept outlives a loss of power.

    Raises:
        RempartError: UNAVAILABLE, the storage does not answer.
        MissingObjectError: it does, and has no such object.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def put_first(self, path: str, content: bytes) -> bool:
        """Keeps the content unless something is there already, which then stays. Returns whether it was kept."""
        with _our_errors():
            try:
                await self._put(path, content, mode="create")
                is_first = True
            except AlreadyExistsError:
                is_first = False
            await self._sync(path)
        return is_first

    async def put_stream(self, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Keeps all that comes, in place of what was there. Nothing changes when it fails or is cancelled."""
        with _our_errors():
            await self._put(path, pieces, max_concurrency=_PARTS_IN_FLIGHT)
            await self._sync(path)

    async def _put(self, path: str, content: bytes | AsyncIterator[bytes], **options: Any) -> None:
        while True:
            try:
                await obstore.put_async(self._store, path, content, **options)
            except GenericError as error:
                if not _has_lost_its_folder(error):
                    raise
            else:
                return

    async def _sync(self, path: str) -> None:
        with suppress(FileNotFoundError):  # somebody removes it already
            await asyncio.to_thread(sync_to_disk, self._store, path)

    async def get(self, path: str) -> bytes:
        with _our_errors():
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

    async def get_range(self, path: str, start: int, end: int) -> bytes:
        with _our_errors():
            return bytes(await obstore.get_range_async(self._store, path, start=start, end=end))

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        with _our_errors():
            got = await obstore.get_async(self._store, path)
            pieces = got.stream(min_chunk_size=_PIECE_BYTES).__aiter__()
        while True:
            with _our_errors():
                try:
                    piece = await anext(pieces)
                except StopAsyncIteration:
                    return
            yield bytes(piece)

    async def delete(self, path: str) -> None:
        """Harmless when there is no such object. What writers that died have left of it goes, too."""
        with _our_errors():
            await asyncio.to_thread(remove_unfinished, self._store, path)
            try:
                await obstore.delete_async(self._store, path)
            except FileNotFoundError:
                return

    async def delete_all(self, prefix: str) -> None:
        with _our_errors():
            async for listed in obstore.list(self._store, prefix):
                paths = [each["path"] for each in listed]
                try:
                    await obstore.delete_async(self._store, paths)
                except FileNotFoundError:  # somebody else deletes them too, and this call has left some
                    for path in paths:
                        await self.delete(path)
            await asyncio.to_thread(remove_unfinished, self._store, prefix)


def file_path(tenant: str, file_id: str) -> str:
    return f"files/{tenant}/{file_id}"


def job_prefix(tenant: str, job_id: str) -> str:
    return f"jobs/{tenant}/{job_id}"


def plan_path(tenant: str, job_id: str) -> str:
    return f"{job_prefix(tenant, job_id)}/plan"


def shard_path(tenant: str, job_id: str, number: int) -> str:
    return f"{job_prefix(tenant, job_id)}/shards/{number:06d}"


def answer_path(tenant: str, job_id: str, number: int) -> str:
    return f"{job_prefix(tenant, job_id)}/lines/{number:06d}"


def _has_lost_its_folder(error: GenericError) -> bool:
    """A folder went with its last object while the store made another below it, and nothing of the content was taken.

    obstore has no name for that.
    """
    return "Unable to create dir" in str(error) and "No such file" in str(error)


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingObjectError from error
    except (BaseError, OSError) as error:
        message = "The storage of batch jobs does not answer."
        raise RempartError(ErrorKind.UNAVAILABLE, message, retry_after_s=_RETRY_AFTER_S) from error
