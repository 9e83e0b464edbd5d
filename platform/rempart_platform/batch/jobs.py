"""The record of a job in Redis, and what tenants do with it."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.files import no_such_file
from rempart_platform.batch.records import read_records
from rempart_platform.batch.values import Batch, BatchStatus, InputError, LineCounts
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.generation import Caller
from rempart_platform.tenancy.batch_keys import ROOT, job_record, jobs_of
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisClient

_CREATE = load_script("batch_create", shared="batch_common")
_CANCEL = load_script("batch_cancel", shared="batch_common", runs_when_memory_is_full=True)
_FULL_RETRY_S = 60.0
_OPTIONAL = (
    "output_lifetime_s",
    "in_progress_s",
    "finalizing_s",
    "completed_s",
    "failed_s",
    "expired_s",
    "cancelling_s",
    "cancelled_s",
)


@dataclass(frozen=True, slots=True)
class Job:
    """A batch with what only workers need to know."""

    batch: Batch
    num_shards: int


async def load_job(redis: RedisClient, job_id: str) -> Job | None:
    stored = await redis.read_hash(job_record(job_id))
    return _parse(job_id, stored) if "status" in stored else None


class StoredBatches:
    """Batch jobs of tenants; see `values.Batches`.

    Args:
        redis: where their records and tasks are.
        config: limits.
        on_created: told of each new job; a worker need not look for it then.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        redis: RedisClient,
        config: BatchConfig,
        on_created: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._limits = config.limits
        self._on_created = on_created
        self._clock = clock

    async def create(
        self,
        caller: Caller,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window_s: int,
        metadata: Mapping[str, str],
        output_lifetime_s: int | None = None,
    ) -> Batch:
        """Returns at once; a worker validates the lines."""
        if not 0 < completion_window_s <= self._limits.max_completion_window_s:
            most = self._limits.max_completion_window_s
            message = f"'completion_window' must be between 1 s and {most} s (limit max_completion_window_s)."
            raise RempartError(ErrorKind.INVALID_REQUEST, message, param="completion_window")
        created_s = int(self._clock())
        batch = Batch(
            batch_id=f"batch_{secrets.token_hex(16)}",
            caller=caller,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window_s=completion_window_s,
            status=BatchStatus.VALIDATING,
            created_s=created_s,
            expires_s=created_s + completion_window_s,
            metadata=dict(metadata),
            output_lifetime_s=output_lifetime_s,
        )
        most_open, most = self._limits.max_open_batches_per_tenant, self._limits.max_batches_per_tenant
        record = [part for pair in _record(batch).items() for part in pair]
        args = (batch.batch_id, caller.tenant, input_file_id, most_open, most, created_s, *record)
        (outcome,) = await self._redis.run_script(_CREATE, (ROOT,), args)
        if outcome == "no_input":
            message = "The file's purpose must be 'batch'."
            raise RempartError(ErrorKind.INVALID_REQUEST, message, param="input_file_id")
        if outcome == "no_file":
            raise no_such_file("input_file_id")
        if outcome == "full":
            raise _too_many(caller.tenant, most_open, "that have not ended", "max_open_batches_per_tenant")
        if outcome == "crowded":
            raise _too_many(caller.tenant, most, "within an hour or so", "max_batches_per_tenant")
        self._on_created()
        return batch

    async def get(self, tenant: str, batch_id: str) -> Batch:
        job = await load_job(self._redis, batch_id)
        if job is None or job.batch.caller.tenant != tenant:
            raise _no_such_batch()
        return job.batch

    async def list(self, tenant: str, *, limit: int, after: str = "") -> tuple[Sequence[Batch], bool]:
        """Reads the records of no others: a tenant may have very many."""
        highest = "+inf"
        if after:
            number = await self._redis.call(lambda redis: redis.zscore(jobs_of(tenant), after))
            if number is None:
                message = "'after' is the id of nothing in this list."
                raise RempartError(ErrorKind.INVALID_REQUEST, message, param="after")
            highest = f"({number}"
        found = await self._redis.call(
            lambda redis: redis.zrevrangebyscore(jobs_of(tenant), highest, "-inf", start=0, num=limit + 1)
        )
        job_ids = [str(each) for each in found[:limit]]
        records = await read_records(self._redis, [job_record(job_id) for job_id in job_ids])
        batches = tuple(
            _parse(job_id, record).batch for job_id, record in zip(job_ids, records, strict=True) if "status" in record
        )
        return batches, len(found) > limit

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Lines that are answered by then are kept."""
        args = (batch_id, tenant, int(self._clock()))
        (outcome,) = await self._redis.run_script(_CANCEL, (ROOT,), args)
        if outcome == "missing":
            raise _no_such_batch()
        batch = await self.get(tenant, batch_id)
        if outcome == "final":
            message = f"The batch has ended already: it is {batch.status.value}."
            raise RempartError(ErrorKind.INVALID_REQUEST, message, param="batch_id")
        return batch


def _record(batch: Batch) -> dict[str, str | int]:
    lifetime = {} if batch.output_lifetime_s is None else {"output_lifetime_s": batch.output_lifetime_s}
    return {
        **lifetime,
        "tenant": batch.caller.tenant,
        "key_id": batch.caller.key_id,
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window_s": batch.completion_window_s,
        "status": batch.status.value,
        "created_s": batch.created_s,
        "expires_s": batch.expires_s,
        "metadata": msgspec.json.encode(batch.metadata).decode(),
    }


def _parse(job_id: str, stored: Mapping[str, str]) -> Job:
    def count(name: str) -> int:
        return int(stored.get(name, "0"))

    batch = Batch(
        batch_id=job_id,
        caller=Caller(stored["tenant"], stored["key_id"]),
        endpoint=stored["endpoint"],
        input_file_id=stored["input_file_id"],
        completion_window_s=count("completion_window_s"),
        status=BatchStatus(stored["status"]),
        created_s=count("created_s"),
        expires_s=count("expires_s"),
        model=stored.get("model", ""),
        metadata=msgspec.json.decode(stored["metadata"], type=dict[str, str]),
        errors=msgspec.json.decode(stored.get("errors", "[]"), type=tuple[InputError, ...]),
        counts=LineCounts(count("total"), count("completed"), count("failed")),
        output_file_id=stored.get("output_file_id", ""),
        error_file_id=stored.get("error_file_id", ""),
        **{name: count(name) for name in _OPTIONAL if name in stored},
    )
    return Job(batch, count("num_shards"))


def _too_many(tenant: str, most: int, which: str, limit: str) -> RempartError:
    return RempartError(
        ErrorKind.RATE_LIMIT_EXCEEDED,
        f"The limit of {most} batches {which} is reached ({limit}).",
        retry_after_s=_FULL_RETRY_S,
        violation=QuotaViolation(tenant, "batches", most),
    )


def _no_such_batch() -> RempartError:
    return RempartError(ErrorKind.NOT_FOUND, "There is no such batch.", param="batch_id")
