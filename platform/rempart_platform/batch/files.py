"""Files of tenants: records in Redis, contents in object storage.

    upload ─► noted as under way ─► content stored ─► listed, no longer under way
    delete ─► no longer listed, noted ─► content removed ─► forgotten

Whatever is noted and never ends that way, by a crash, a janitor removes.
"""

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.records import read_records
from rempart_platform.batch.storage import BatchStorage, MissingObjectError, file_path
from rempart_platform.batch.values import MAX_PIECE_BYTES, StoredFile, file_too_large
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.tenancy.batch_keys import ROOT, UPLOADS, file_record, files_of
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisClient

_ADD = load_script("batch_file_add", shared="batch_common")
_REMOVE = load_script("batch_file_remove", shared="batch_common", runs_when_memory_is_full=True)
_NO_LIMIT = 0
_BUSY_RETRY_S = 5.0


class StoredFiles:
    """Files of tenants; see `values.Files`.

    Args:
        redis: where their records are.
        storage: where their contents are.
        config: limits.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        redis: RedisClient,
        storage: BatchStorage,
        config: BatchConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._storage = storage
        self._config = config
        self._limits = config.limits
        self._clock = clock
        self._transfers: Counter[str] = Counter()

    async def create(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        content: AsyncIterator[bytes],
        *,
        lifetime_s: Callable[[], int | None] = lambda: None,
    ) -> StoredFile:
        """Stores the content first and lists the file second."""
        most = self._limits.max_files_per_tenant
        with self._transfer(tenant):
            if await self._redis.call(lambda redis: redis.zcard(files_of(tenant))) >= most:
                raise self._too_many(tenant)
            created_s = int(self._clock())
            file_id = f"file-{secrets.token_hex(16)}"
            try:
                num_bytes = await self._store(tenant, file_id, self._limited(content))
                expires_s = self._limits.expiry_s(created_s, lifetime_s())
            except BaseException:
                # Whatever the storage has taken of it by now: it is in no list.
                with contextlib.suppress(RempartError):  # the janitor removes it else
                    await self.remove_content(tenant, file_id)
                raise
            return await self._add(
                StoredFile(file_id, tenant, filename, purpose, num_bytes, created_s, expires_s), most
            )

    async def put(self, file: StoredFile, content: AsyncIterator[bytes]) -> StoredFile:
        """Stores and lists a file, in place of one with its id, however many its tenant has."""
        num_bytes = await self._store(file.tenant, file.file_id, content)
        return await self._add(replace(file, num_bytes=num_bytes), _NO_LIMIT)

    @contextmanager
    def _transfer(self, tenant: str) -> Iterator[None]:
        most = self._limits.max_transfers_per_tenant
        if self._transfers[tenant] >= most:
            raise RempartError(
                ErrorKind.RATE_LIMIT_EXCEEDED,
                f"The limit of {most} uploads and downloads at a time is reached (max_transfers_per_tenant).",
                retry_after_s=_BUSY_RETRY_S,
                violation=QuotaViolation(tenant, "transfers", most),
            )
        self._transfers[tenant] += 1
        try:
            yield
        finally:
            self._transfers[tenant] -= 1
            if not self._transfers[tenant]:
                del self._transfers[tenant]

    async def _store(self, tenant: str, file_id: str, content: AsyncIterator[bytes]) -> int:
        """Stores a content, noted as under way until it is listed. Returns its bytes."""
        counted = _Counted(content)
        name = f"{tenant} {file_id}"
        given_up_s = int(self._clock() + self._config.upload_timeout_s)
        await self._redis.call(lambda redis: redis.zadd(UPLOADS, {name: given_up_s}))
        await self._storage.put_stream(file_path(tenant, file_id), counted.pieces())
        return counted.num_bytes

    async def _add(self, file: StoredFile, most: int) -> StoredFile:
        """Lists a file whose content is stored."""
        record = [part for pair in _record(file).items() for part in pair]
        (is_listed,) = await self._redis.run_script(
            _ADD, (ROOT,), (file.file_id, file.tenant, most, file.expires_s, *record)
        )
        if not is_listed:
            await self.remove_content(file.tenant, file.file_id)
            raise self._too_many(file.tenant)
        return file

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        file = _parse(file_id, await self._redis.read_hash(file_record(file_id)))
        if file is None or file.tenant != tenant or 0 < file.expires_s <= self._clock():
            raise no_such_file("file_id")
        return file

    async def list(self, tenant: str, *, purpose: str = "") -> Sequence[StoredFile]:
        """Newest first."""
        file_ids = [
            str(each) for each in await self._redis.call(lambda redis: redis.zrevrange(files_of(tenant), 0, -1))
        ]
        records = await read_records(self._redis, [file_record(file_id) for file_id in file_ids])
        files = [_parse(file_id, record) for file_id, record in zip(file_ids, records, strict=True)]
        now_s = self._clock()
        return tuple(
            file
            for file in files
            if file is not None and (not purpose or file.purpose == purpose) and not 0 < file.expires_s <= now_s
        )

    async def delete(self, tenant: str, file_id: str) -> None:
        """Refused while an open batch reads it."""
        await self.get(tenant, file_id)
        if not await self.remove(tenant, file_id):
            message = "The file is read by a batch that has not ended. Cancel that first."
            raise RempartError(ErrorKind.INVALID_REQUEST, message, param="file_id")

    async def read(self, file: StoredFile) -> AsyncGenerator[bytes, None]:
        """Its content, in pieces of up to `MAX_PIECE_BYTES`, none empty."""
        with self._transfer(file.tenant):
            try:
                async for piece in self._storage.stream(file_path(file.tenant, file.file_id)):
                    for start in range(0, len(piece), MAX_PIECE_BYTES):
                        yield piece[start : start + MAX_PIECE_BYTES]
            except MissingObjectError:
                raise no_such_file("file_id") from None

    async def remove(self, tenant: str, file_id: str) -> bool:
        """Removes a file, if there is one. False when an open batch reads it."""
        args = (file_id, tenant, int(self._clock()))
        (outcome,) = await self._redis.run_script(_REMOVE, (ROOT,), args)
        if outcome == "removed":
            await self.remove_content(tenant, file_id)
        return outcome != "in_use"

    async def remove_content(self, tenant: str, file_id: str) -> None:
        """Removes what is stored of a file that is not listed."""
        await self._storage.delete(file_path(tenant, file_id))
        await self._redis.call(lambda redis: redis.zrem(UPLOADS, f"{tenant} {file_id}"))

    async def give_up(self, tenant: str, file_id: str) -> None:
        """Ends an upload that did not end. Its content stays when the file is listed: another had made it."""
        if await self._redis.call(lambda redis: redis.zscore(files_of(tenant), file_id)) is None:
            await self.remove_content(tenant, file_id)
        else:
            await self._redis.call(lambda redis: redis.zrem(UPLOADS, f"{tenant} {file_id}"))

    async def _limited(self, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        left = self._limits.max_file_bytes
        async for piece in content:
            left -= len(piece)
            if left < 0:
                raise file_too_large(self._limits)
            yield piece

    def _too_many(self, tenant: str) -> RempartError:
        most = self._limits.max_files_per_tenant
        return RempartError(
            ErrorKind.INVALID_REQUEST,
            f"The limit of {most} files is reached (max_files_per_tenant). Delete some first.",
            param="file",
            violation=QuotaViolation(tenant, "files", most),
        )


class _Counted:
    """Counts bytes on their way."""

    def __init__(self, content: AsyncIterator[bytes]) -> None:
        self._content = content
        self.num_bytes = 0

    async def pieces(self) -> AsyncIterator[bytes]:
        async for piece in self._content:
            self.num_bytes += len(piece)
            yield piece


def no_such_file(param: str) -> RempartError:
    return RempartError(ErrorKind.NOT_FOUND, "There is no such file.", param=param)


def _record(file: StoredFile) -> dict[str, str | int]:
    return {
        "tenant": file.tenant,
        "filename": file.filename,
        "purpose": file.purpose,
        "num_bytes": file.num_bytes,
        "created_s": file.created_s,
        "expires_s": file.expires_s,
    }


def _parse(file_id: str, stored: Mapping[str, str]) -> StoredFile | None:
    if "tenant" not in stored:
        return None
    return StoredFile(
        file_id=file_id,
        tenant=stored["tenant"],
        filename=stored["filename"],
        purpose=stored["purpose"],
        num_bytes=int(stored["num_bytes"]),
        created_s=int(stored["created_s"]),
        expires_s=int(stored["expires_s"]),
    )
