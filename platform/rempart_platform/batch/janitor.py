"""What nobody waits for: lost tasks are added again, and what has had its time is removed.

Every act is harmless when done twice, so two janitors at a time do no harm.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.files import StoredFiles
from rempart_platform.batch.jobs import load_job
from rempart_platform.batch.metrics import BatchMetrics
from rempart_platform.batch.storage import BatchStorage, job_prefix
from rempart_platform.batch.work_queue import WorkQueue
from rempart_platform.errors import RempartError
from rempart_platform.tenancy.batch_keys import ENDED_JOBS, EXPIRING, KEPT_JOBS, OPEN_JOBS, ROOT, UPLOADS
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisClient

logger = logging.getLogger(__name__)

_FORGET = load_script("batch_forget", shared="batch_common", runs_when_memory_is_full=True)
_MAX_AT_A_TIME = 1000


class Janitor:
    """Looks after all jobs and files.

    Args:
        redis: where their records are.
        storage: where their contents are.
        config: how long things are kept.
        metrics: told how all jobs stand.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        redis: RedisClient,
        storage: BatchStorage,
        config: BatchConfig,
        metrics: BatchMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._storage = storage
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._files = StoredFiles(redis, storage, config, clock)
        self._queue = WorkQueue(redis, config, "janitor", clock)

    async def run(self, is_leader: Callable[[], bool]) -> None:
        """Looks at how jobs stand, and cleans while `is_leader`, until cancelled."""
        while True:
            try:
                await self.look()
                if is_leader():
                    await self.clean()
            except RempartError as error:
                logger.warning("batch jobs could not be looked after: %s", error.message)
            except Exception:
                # Online requests of this router go on.
                logger.exception("batch jobs could not be looked after")
            await asyncio.sleep(self._config.janitor_s)

    async def look(self) -> None:
        """Measures."""
        num_open = await self._redis.call(lambda redis: redis.zcard(OPEN_JOBS))
        oldest = await self._redis.call(lambda redis: redis.zrange(OPEN_JOBS, 0, 0))
        job = await load_job(self._redis, str(oldest[0])) if oldest else None
        self._metrics.stand(num_open, self._clock() - job.batch.created_s if job is not None else 0.0)

    async def clean(self) -> None:
        """Does all there is to do.

        Raises:
            RempartError: UNAVAILABLE; what is left is done the next time.
        """
        await self._repair_jobs()
        now_s = self._clock()
        for tenant, file_id in await self._due(EXPIRING, now_s):
            await self._files.remove(tenant, file_id)
        for tenant, file_id in await self._due(UPLOADS, now_s):
            await self._files.give_up(tenant, file_id)
        for tenant, job_id in await self._due(ENDED_JOBS, now_s - self._config.keep_parts_s):
            await self._storage.delete_all(job_prefix(tenant, job_id))
            await self._move_to_kept(f"{tenant} {job_id}", now_s)
        for tenant, job_id in await self._due(KEPT_JOBS, now_s - self._config.record_lifetime_s):
            await self._redis.run_script(_FORGET, (ROOT,), (job_id, tenant))

    async def _repair_jobs(self) -> None:
        for job_id in await self._redis.call(lambda redis: redis.zrange(OPEN_JOBS, 0, -1)):
            num_added = await self._queue.repair(str(job_id))
            if num_added:
                self._metrics.repaired(num_added)
                fields = {"batch_id": job_id, "num_tasks": num_added}
                logger.warning("lost batch tasks were added again", extra={"fields": fields})

    async def _due(self, key: str, until_s: float) -> list[tuple[str, str]]:
        """Pairs "<tenant> <id>" of a sorted set whose time has come."""
        names = await self._redis.call(
            lambda redis: redis.zrangebyscore(key, "-inf", until_s, start=0, num=_MAX_AT_A_TIME)
        )
        return [(tenant, each) for tenant, _, each in (str(name).partition(" ") for name in names)]

    async def _move_to_kept(self, name: str, now_s: float) -> None:
        await self._redis.call(lambda redis: redis.zadd(KEPT_JOBS, {name: now_s}))
        await self._redis.call(lambda redis: redis.zrem(ENDED_JOBS, name))
