"""The batch work of one router: it takes tasks while it has room, keeps them, and does them.

claim ─► begin ─► validate │ shard │ finalize ─► done
  ▲  a task whose worker is gone comes back by itself; what it had answered is kept
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.files import StoredFiles
from rempart_platform.batch.finalizing import finalize
from rempart_platform.batch.input_check import BadInputError, check_input
from rempart_platform.batch.jobs import Job, load_job
from rempart_platform.batch.lanes import Lanes, LaneTask
from rempart_platform.batch.metrics import BatchMetrics
from rempart_platform.batch.plan import Plan
from rempart_platform.batch.shard_work import LeftTaskError, ShardWork
from rempart_platform.batch.storage import BatchStorage, MissingObjectError, file_path, plan_path
from rempart_platform.batch.values import BatchStatus, InputError, LineRunner
from rempart_platform.batch.work_queue import FINALIZE, VALIDATE, Claim, Interruption, WorkQueue
from rempart_platform.errors import RempartError
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_INPUT_GONE = InputError("input_file_missing", "The input file is no longer there.")
_ANSWERS_GONE = InputError("answers_missing", "Answers of this batch are no longer in the storage.")
_GIVEN_UP = InputError("dead_letter", "The input was given up after it had been read in vain several times.")


class BatchWorker:
    """Does tasks of batch jobs; made by `open_worker`, which also runs it.

    Args:
        redis: where jobs and tasks are.
        storage: where files and answers are.
        runner: answers a line.
        is_model: whether a model is served here.
        config: how much at a time, and for how long.
        metrics: told of all.
        clock: seconds since the epoch.
        woken: set when there may be work that would else be found by looking for it.
    """

    def __init__(
        self,
        redis: RedisClient,
        storage: BatchStorage,
        runner: LineRunner,
        is_model: Callable[[str], bool],
        config: BatchConfig,
        metrics: BatchMetrics,
        clock: Callable[[], float] = time.time,
        woken: asyncio.Event | None = None,
    ) -> None:
        self._redis = redis
        self._storage = storage
        self._files = StoredFiles(redis, storage, config, clock)
        self._is_model = is_model
        self._config = config
        self.drain_s = config.drain_s
        """How long each step of stopping may take."""
        self._metrics = metrics
        self._queue = WorkQueue(redis, config, secrets.token_hex(8), clock)
        self._shards = ShardWork(self._queue, storage, runner, config, metrics, clock)
        self._woken = woken if woken is not None else asyncio.Event()
        self._lanes = Lanes(config, metrics, self._woken.set)
        self._claims: dict[Claim, asyncio.Task[None]] = {}
        self._closing = asyncio.Event()

    async def keep_claiming(self) -> None:
        """Takes tasks until closed."""
        while not self._closing.is_set():
            self._woken.clear()
            try:
                while not self._closing.is_set() and await self._take_one():
                    pass
            except RedisAwayError as error:
                logger.warning("the batch queue could not be reached")
                await self._pause(error.retry_after_s or _RETRY_S)
                continue
            except Exception:
                # Whatever a job may do to this task, online requests of this router go on.
                logger.exception("no batch task could be taken")
                await self._pause(_RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.poll_s):
                    await self._woken.wait()

    async def keep_renewing(self) -> None:
        """Keeps what it has until closed."""
        while not self._closing.is_set():
            await asyncio.sleep(self._config.lease_s / 3)
            # Together, for they share round trips: one by one, many would outlast their leases when Redis is slow.
            await asyncio.gather(*(self._renew(claim) for claim in self._claims))

    async def close(self) -> None:
        """Stops at once, and gives back what is not done."""
        self._closing.set()
        self._woken.set()
        for claim in self._claims:
            claim.interrupt(Interruption.DRAINING)
        claims = dict(self._claims)
        if not claims:
            return
        _, late = await asyncio.wait(claims.values(), timeout=self.drain_s)
        if late:
            for task in late:
                task.cancel()
            await asyncio.wait(late)
            await asyncio.gather(*(self._give_back(claim) for claim, task in claims.items() if task in late))

    async def _take_one(self) -> bool:
        claim = await self._queue.claim(self._lanes.full()) if self._lanes.has_room else None
        if claim is None:
            return False
        job = await self._begin(claim)
        if job is None or self._closing.is_set():
            await self._give_back(claim)
            return False
        self._claims[claim] = asyncio.create_task(self._do(claim, job))
        await asyncio.sleep(0)  # it enters its lane, which counts for the next claim
        return True

    async def _begin(self, claim: Claim) -> Job | None:
        """None when there is no such job any more, when another worker has the task, or when closed."""
        while not self._closing.is_set():
            try:
                return await load_job(self._redis, claim.job_id) if await self._queue.begin(claim) else None
            except RedisAwayError as error:
                await self._pause(error.retry_after_s or _RETRY_S)
        return None

    async def _renew(self, claim: Claim) -> None:
        try:
            status = await self._queue.renew(claim)
        except RedisAwayError:
            return  # should the lease end meanwhile, the next answer is refused
        except Exception:
            logger.exception("a batch task could not be renewed", extra={"fields": _fields(claim)})
            return
        if status is None:
            claim.interrupt(Interruption.LOST)
        elif status is BatchStatus.CANCELLING:
            claim.interrupt(Interruption.CANCELLED)

    async def _do(self, claim: Claim, job: Job) -> None:
        kind = claim.task if claim.task in (VALIDATE, FINALIZE) else "shard"
        if job.batch.status is BatchStatus.CANCELLING:
            claim.interrupt(Interruption.CANCELLED)
        if claim.deliveries == self._config.max_deliveries + 1:
            self._metrics.dead_letter()
            logger.error("a batch task was delivered in vain", extra={"fields": _fields(claim)})
        self._metrics.task_taken()
        outcome = "failed"
        try:
            with self._lanes.task(job.batch.caller.tenant, job.batch.model) as room:
                outcome = await self._until_done(claim, job, room)
        except Exception:
            # Its lease runs out, and it is tried again as often as one that ends its router.
            logger.exception("a batch task failed", extra={"fields": _fields(claim)})
        finally:
            del self._claims[claim]
            self._metrics.task_left(kind, outcome)
            self._woken.set()

    async def _until_done(self, claim: Claim, job: Job, room: LaneTask) -> str:
        """Does a task, beginning again while Redis or the storage is away. Returns how that ended."""
        while not claim.is_over:
            try:
                return "done" if await self._step(claim, job, room) else "lost"
            except RempartError as error:
                logger.warning("a batch task waits: %s", error.message, extra={"fields": _fields(claim)})
                await self._pause(error.retry_after_s or _RETRY_S)
            except LeftTaskError:
                break
        return "lost" if claim.interruption is Interruption.LOST else await self._give_back(claim)

    async def _give_back(self, claim: Claim) -> str:
        try:
            return "released" if await self._queue.release(claim) else "lost"
        except RedisAwayError:
            return "lost"  # until the lease runs out

    async def _pause(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._closing.wait()

    async def _step(self, claim: Claim, job: Job, room: LaneTask) -> bool:
        try:
            if claim.task == VALIDATE:
                return await self._validate(claim, job)
            if claim.task == FINALIZE:
                room.opened(0)
                return await finalize(claim, job, self._queue, self._storage, self._files, self._config.limits)
            return await self._shards.run(claim, job, room)
        except MissingObjectError:
            return await self._queue.fail(claim, [_ANSWERS_GONE if claim.task == FINALIZE else _INPUT_GONE])

    async def _validate(self, claim: Claim, job: Job) -> bool:
        if claim.deliveries > self._config.max_deliveries:
            return await self._queue.fail(claim, [_GIVEN_UP])
        batch = job.batch
        path = plan_path(batch.caller.tenant, batch.batch_id)
        try:
            plan = Plan.decode(await self._storage.get(path))
        except MissingObjectError:
            content = self._storage.stream(file_path(batch.caller.tenant, batch.input_file_id))
            try:
                plan = await check_input(content, batch.endpoint, self._config, self._is_model)
            except BadInputError as error:
                return await self._queue.fail(claim, error.errors)
            if not await self._storage.put_first(path, plan.encoded()):
                plan = Plan.decode(await self._storage.get(path))
        return await self._queue.start(claim, plan)


def _fields(claim: Claim) -> dict[str, object]:
    return {"batch_id": claim.job_id, "task": claim.task, "deliveries": claim.deliveries}


@asynccontextmanager
async def open_worker(worker: BatchWorker) -> AsyncIterator[None]:
    """Works beside the block; leaving it gives back what is not done."""
    async with asyncio.TaskGroup() as tasks:
        claiming, renewing = tasks.create_task(worker.keep_claiming()), tasks.create_task(worker.keep_renewing())
        try:
            yield
        finally:
            await worker.close()
            await asyncio.wait({claiming}, timeout=worker.drain_s)  # a claim under way is given back too
            for task in (claiming, renewing):
                task.cancel()
