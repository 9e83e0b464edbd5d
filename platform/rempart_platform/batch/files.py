"""Files of tenants: records in Redis, contents in object storage.

    upload ─► noted as under way ─► content stored ─► listed, no longer under way
    delete ─► no longer listed, noted ─► content removed ─► forgotten

Whatever is noted and never ends that way, by a crash, a janitor removes.
"""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.records import read_records
from rempart_platform.batch.storage import BatchStorage, MissingObjectError, file_path
from rempart_platform.batch.values import StoredFile
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.tenancy.batch_keys import ROOT, UPLOADS, file_record, files_of
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisClient

_ADD = load_script("batch_file_add", shared="batch_common")
_REMOVE = load_script("batch_file_remove", shared="batch_common", runs_when_memory_is_full=True)
_NO_LIMIT = 0


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

    async def create(
        self, tenant: str, filename: str, purpose: str, content: AsyncIterator[bytes], *, lifetime_s: int | None = None
    ) -> StoredFile:
        """Stores the content first and lists the file second."""
        if await self._redis.call(lambda redis: redis.zcard(files_of(tenant))) >= self._limits.max_files_per_tenant:
            raise self._too_many(tenant)
        created_s = int(self._clock())
        lifetime_s = self._limits.file_lifetime_s if lifetime_s is None else lifetime_s
        file = StoredFile(
            file_id=f"file-{secrets.token_hex(16)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            num_bytes=0,
            created_s=created_s,
            expires_s=created_s + lifetime_s if lifetime_s else 0,
        )
        return await self.put(file, self._limited(content), most=self._limits.max_files_per_tenant)

    async def put(self, file: StoredFile, content: AsyncIterator[bytes], *, most: int = _NO_LIMIT) -> StoredFile:
        """Stores and lists a file, in place of one with its id. `most` limits the files of its tenant; 0 does not."""
        counted = _Counted(content)
        name = f"{file.tenant} {file.file_id}"
        given_up_s = int(self._clock() + self._config.upload_timeout_s)
        await self._redis.call(lambda redis: redis.zadd(UPLOADS, {name: given_up_s}))
        try:
            await self._storage.put_stream(file_path(file.tenant, file.file_id), counted.pieces())
        except BaseException:
            with contextlib.suppress(RempartError):  # the janitor forgets it else
                await self._redis.call(lambda redis: redis.zrem(UPLOADS, name))
            raise
        file = replace(file, num_bytes=counted.num_bytes)
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

    async def read(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Its content, in pieces."""
        try:
            async for piece in self._storage.stream(file_path(file.tenant, file.file_id)):
                yield piece
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

    async def _limited(self, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        left, most = self._limits.max_file_bytes, self._limits.max_file_bytes
        async for piece in content:
            left -= len(piece)
            if left < 0:
                message = f"The file is larger than {most} bytes (limit max_file_bytes)."
                raise RempartError(ErrorKind.REQUEST_TOO_LARGE, message, param="file")
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
