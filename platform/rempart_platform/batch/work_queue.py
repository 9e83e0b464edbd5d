"""Tasks of jobs: who has which, and what becomes of them.

    claimed ─► begun ─► renewed, renewed ... ─► done: stored, counted, acknowledged, in one script
       │                                    ├─► given back: the next worker has it at once
       └─ worker gone ──────────────────────┴─► the next worker has it when the lease has run out

Each claim has a token of its own. Whatever a worker writes names it, and is refused once another has the task.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.plan import Plan
from rempart_platform.batch.result_lines import Outcome, ResultLine, Tally
from rempart_platform.batch.values import BatchStatus, InputError
from rempart_platform.tenancy.batch_keys import ROOT, lines_of
from rempart_platform.tenancy.lua import Script, load_script
from rempart_platform.tenancy.redis_client import RedisClient, ScriptReply

VALIDATE, FINALIZE = "validate", "finalize"
_NUM_CLAIM_FIELDS = 4


def _load(name: str, *, runs_when_memory_is_full: bool = True) -> Script:
    return load_script(name, shared="batch_common", runs_when_memory_is_full=runs_when_memory_is_full)


_CLAIM = _load("batch_claim")
_BEGIN = _load("batch_begin")
_RENEW = _load("batch_renew")
_RELEASE = _load("batch_release")
_ANSWER = _load("batch_answer", runs_when_memory_is_full=False)
_START = _load("batch_start", runs_when_memory_is_full=False)
_FAIL = _load("batch_fail")
_FINISH_SHARD = _load("batch_finish_shard")
_FINISH = _load("batch_finish")
_REPAIR = _load("batch_repair", runs_when_memory_is_full=False)


class Interruption(Enum):
    """Why a worker must not go on with a task as before."""

    LOST = "lost"
    """Another worker has it."""
    DRAINING = "draining"
    """This router stops."""
    CANCELLED = "cancelled"
    """The tenant wants no more answers."""
    EXPIRED = "expired"
    """The job's time is up."""

    @property
    def ends_task(self) -> bool:
        """Otherwise what is open gets an error, and the task goes on."""
        return self in (Interruption.LOST, Interruption.DRAINING)


@dataclass(slots=True, eq=False)
class Claim:
    """A task that this worker has."""

    job_id: str
    task: str
    entry: str
    token: str
    deliveries: int = 0
    """Since a line of it was answered last, this one among them once it has begun."""
    interruption: Interruption | None = None
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)

    def interrupt(self, why: Interruption) -> None:
        """The first reason counts, unless the new one ends the task."""
        if self.interruption is None or (why.ends_task and not self.interruption.ends_task):
            self.interruption = why
        self.interrupted.set()

    @property
    def is_over(self) -> bool:
        """This worker must write nothing more of it."""
        return self.interruption is not None and self.interruption.ends_task


class WorkQueue:
    """The tasks of one worker.

    Args:
        redis: where they are.
        config: lease and deliveries.
        worker: its name among all.
        clock: seconds since the epoch.

    Raises:
        RedisAwayError: Redis does not answer. Every call may be made again then.
    """

    def __init__(
        self, redis: RedisClient, config: BatchConfig, worker: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._redis = redis
        self._worker = worker
        self._lease_ms = round(config.lease_s * 1000)
        self._max_deliveries = config.max_deliveries
        self._clock = clock

    async def claim(self, full_lanes: Sequence[str]) -> Claim | None:
        """One task of which this worker may have more; None when there is none."""
        num_looked_at = 0
        while True:
            reply = await self._run(_CLAIM, self._worker, self._lease_ms, *full_lanes)
            if len(reply) == _NUM_CLAIM_FIELDS:
                job_id, task, entry, token = map(str, reply)
                return Claim(job_id, task, entry, token)
            num_tenants, num_all_tenants = (int(count or 0) for count in reply)
            num_looked_at += num_tenants
            if num_looked_at >= num_all_tenants:
                return None

    async def begin(self, claim: Claim) -> bool:
        """Counts the delivery, before anything is done of the task. False when another worker has it."""
        args = (claim.job_id, claim.task, claim.token, self._max_deliveries)
        (deliveries,) = await self._run(_BEGIN, *args)
        claim.deliveries = int(deliveries or 0)
        return claim.deliveries > 0

    async def renew(self, claim: Claim) -> BatchStatus | None:
        """Keeps a task for another lease. Returns the job's status; None when another worker has the task."""
        is_held, *status = await self._run(_RENEW, claim.job_id, claim.task, claim.token, claim.entry, self._worker)
        return BatchStatus(status[0]) if is_held else None

    async def release(self, claim: Claim) -> bool:
        """Gives a task back undone."""
        args = (claim.job_id, claim.task, claim.token, claim.entry, self._worker, self._lease_ms)
        return await self._is_taken(_RELEASE, *args)

    async def answers(self, claim: Claim) -> dict[int, ResultLine]:
        """What is kept of a shard, by line number."""
        stored = await self._redis.read_hash(lines_of(claim.job_id, claim.task))
        return {int(number): ResultLine.parse(kept.encode()) for number, kept in stored.items()}

    async def answer(self, claim: Claim, number: int, result: ResultLine) -> bool:
        """Keeps the answer of one line, unless there is one. False when another worker has the shard."""
        outcome = "completed" if result.outcome is Outcome.COMPLETED else "failed"
        args = (claim.job_id, claim.task, claim.token, number, outcome, result.kept().decode())
        return await self._is_taken(_ANSWER, *args)

    async def start(self, claim: Claim, plan: Plan) -> bool:
        """Makes tasks of a plan's shards."""
        args = (claim.job_id, claim.token, claim.entry, self._now_s())
        return await self._is_taken(_START, *args, plan.model, plan.num_lines, len(plan.shards))

    async def fail(self, claim: Claim, errors: Sequence[InputError]) -> bool:
        """Ends a job whose input was refused."""
        args = (claim.job_id, claim.task, claim.token, claim.entry, self._now_s())
        return await self._is_taken(_FAIL, *args, msgspec.json.encode(errors).decode())

    async def finish_shard(self, claim: Claim, tally: Tally) -> bool:
        """Counts a shard whose answers are stored."""
        args = (claim.job_id, claim.task, claim.token, claim.entry, self._now_s())
        counts = (tally.num_completed, tally.num_failed, tally.counts[Outcome.EXPIRED])
        return await self._is_taken(_FINISH_SHARD, *args, *counts)

    async def finish(self, claim: Claim, output_file_id: str, error_file_id: str) -> bool:
        """Ends a job whose result files are listed; "" for one that it does not have."""
        args = (claim.job_id, claim.token, claim.entry, self._now_s(), output_file_id, error_file_id)
        return await self._is_taken(_FINISH, *args)

    async def repair(self, job_id: str) -> int:
        """Adds tasks that an open job has lost. Returns how many."""
        (num_added,) = await self._run(_REPAIR, job_id)
        return int(num_added or 0)

    async def _is_taken(self, script: Script, *args: str | int) -> bool:
        """False when it was refused, for another worker has the task."""
        (is_taken,) = await self._run(script, *args)
        return is_taken == 1

    async def _run(self, script: Script, *args: str | int) -> ScriptReply:
        return await self._redis.run_script(script, (ROOT,), args)

    def _now_s(self) -> int:
        return int(self._clock())
