"""All of batch jobs that one router has: files and batches for its front ends, a worker, a janitor."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.files import StoredFiles
from rempart_platform.batch.janitor import Janitor
from rempart_platform.batch.jobs import StoredBatches
from rempart_platform.batch.metrics import BatchMetrics
from rempart_platform.batch.storage import BatchStorage
from rempart_platform.batch.values import LineRunner
from rempart_platform.batch.workers import BatchWorker, open_worker
from rempart_platform.object_store import open_object_store
from rempart_platform.tenancy.redis_client import RedisClient


class BatchService:
    """What the router wires.

    Args:
        redis: where records and tasks are.
        config: names the storage.
        registry: of metrics.

    Raises:
        ObjectStoreUrlError: the storage's URL is none.
    """

    def __init__(self, redis: RedisClient, config: BatchConfig, registry: CollectorRegistry) -> None:
        self._redis = redis
        self._config = config
        self._storage = BatchStorage(open_object_store(config.store))
        self._metrics = BatchMetrics(registry)
        self._work = asyncio.Event()
        self.files = StoredFiles(redis, self._storage, config)
        self.batches = StoredBatches(redis, config, on_created=self._work.set)

    @asynccontextmanager
    async def working(
        self, runner: LineRunner, is_model: Callable[[str], bool], is_leader: Callable[[], bool]
    ) -> AsyncIterator[None]:
        """Works beside the block; leaving it gives back what is not done.

        Args:
            runner: answers a line.
            is_model: whether a model is served here.
            is_leader: whether this router's janitor cleans; several may.
        """
        worker = BatchWorker(
            self._redis, self._storage, runner, is_model, self._config, self._metrics, woken=self._work
        )
        janitor = Janitor(self._redis, self._storage, self._config, self._metrics)
        async with asyncio.TaskGroup() as tasks, open_worker(worker):
            cleaning = tasks.create_task(janitor.run(is_leader))
            try:
                yield
            finally:
                cleaning.cancel()
