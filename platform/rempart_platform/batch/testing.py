"""For tests of batch jobs: a scripted way to answer lines, and everything around a worker on a real Redis."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.files import StoredFiles
from rempart_platform.batch.janitor import Janitor
from rempart_platform.batch.jobs import StoredBatches
from rempart_platform.batch.metrics import BatchMetrics
from rempart_platform.batch.storage import BatchStorage
from rempart_platform.batch.values import Batch, LineAnswer
from rempart_platform.batch.workers import BatchWorker, open_worker
from rempart_platform.errors import RempartError
from rempart_platform.generation import Caller
from rempart_platform.object_store import open_object_store
from rempart_platform.tenancy.batch_keys import work_of
from rempart_platform.tenancy.redis_client import RedisClient

ENDPOINT = "/v1/completions"
MODEL = "fake"
CALLER = Caller("acme", "0" * 16)


def request_line(number: int, **changes: object) -> dict[str, object]:
    """A line whose right answer is "answer to <number>"."""
    body = {"model": MODEL, "prompt": str(number)}
    return {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body, **changes}


def as_input(lines: Sequence[object]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def in_pieces(content: bytes, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@dataclass(slots=True)
class ScriptedRunner:
    """Answers a prompt with its name. A script of a prompt is what is done first, an attempt each."""

    scripts: dict[str, Sequence[Exception]] = field(default_factory=lambda: defaultdict(tuple))
    """RempartErrors are answered, others raised."""
    held: set[str] = field(default_factory=set)
    """Prompts that are answered only once `released` is set."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    """In the order in which they were answered first."""
    raised: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """Prompts under which it raised an error, each time."""
    num_running: int = 0
    most_running: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, caller: Caller, endpoint: str, body: bytes, timeout_s: float) -> LineAnswer:
        prompt = json.loads(body)["prompt"]
        self.attempts[prompt] += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self._changed.set()
        try:
            return await self._answer(prompt)
        finally:
            self.num_running -= 1

    async def wait_until(self, attempts: int) -> None:
        """Until as many attempts have been made."""
        while self.attempts.total() < attempts:
            self._changed.clear()
            await self._changed.wait()

    async def _answer(self, prompt: str) -> LineAnswer:
        if self.scripts[prompt]:
            error, *self.scripts[prompt] = self.scripts[prompt]
            if not isinstance(error, RempartError):
                self.raised.put_nowait(prompt)
                raise error
            return LineAnswer(error.answer.http_status, f"id-{prompt}", b'{"error":{}}', error)
        if prompt in self.held:
            await self.released.wait()
        await asyncio.sleep(0)
        self.answered[prompt] += 1
        return LineAnswer(200, f"id-{prompt}", json.dumps({"text": f"answer to {prompt}"}).encode())


@dataclass(slots=True)
class BatchRig:
    """Batch jobs on one Redis and one folder, with a clock that a test sets. Workers are added by the test."""

    redis: RedisClient
    folder: Path
    config: BatchConfig
    runner: ScriptedRunner = field(default_factory=ScriptedRunner)
    now_s: float = 1_000_000.0
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    metrics: BatchMetrics = field(init=False)
    storage: BatchStorage = field(init=False)
    files: StoredFiles = field(init=False)
    batches: StoredBatches = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = BatchMetrics(self.registry)
        self.batches = StoredBatches(self.redis, self.config, clock=self.clock)
        self.use(BatchStorage(open_object_store(f"file://{self.folder}/objects")))

    def use(self, storage: BatchStorage) -> None:
        """Keeps all there from now on."""
        self.storage = storage
        self.files = StoredFiles(self.redis, storage, self.config, self.clock)

    def clock(self) -> float:
        return self.now_s

    def worker(self, runner: ScriptedRunner | None = None) -> BatchWorker:
        answers = runner if runner is not None else self.runner
        return BatchWorker(
            self.redis, self.storage, answers, lambda model: model == MODEL, self.config, self.metrics, self.clock
        )

    @asynccontextmanager
    async def working(self, runner: ScriptedRunner | None = None) -> AsyncIterator[BatchWorker]:
        worker = self.worker(runner)
        async with open_worker(worker):
            yield worker

    def janitor(self) -> Janitor:
        return Janitor(self.redis, self.storage, self.config, self.metrics, self.clock)

    async def upload(self, content: bytes, tenant: str = CALLER.tenant) -> str:
        file = await self.files.create(tenant, "input.jsonl", "batch", in_pieces(content))
        return file.file_id

    async def submit(self, lines: Sequence[object], window_s: int = 3600, caller: Caller = CALLER) -> Batch:
        return await self.batches.create(
            caller,
            input_file_id=await self.upload(as_input(lines), caller.tenant),
            endpoint=ENDPOINT,
            completion_window_s=window_s,
            metadata={"for": "a test"},
        )

    async def reload(self, batch: Batch) -> Batch:
        return await self.batches.get(batch.caller.tenant, batch.batch_id)

    async def ended(self, batch: Batch, timeout_s: float = 60.0) -> Batch:
        """The batch once it is final."""
        async with asyncio.timeout(timeout_s):
            while True:
                batch = await self.reload(batch)
                if batch.status.is_final:
                    return batch
                await asyncio.sleep(0.01)

    async def answered(self, batch: Batch, num_lines: int, timeout_s: float = 60.0) -> None:
        """Returns when at least as many lines have been answered."""
        async with asyncio.timeout(timeout_s):
            while True:
                if (await self.reload(batch)).counts.completed >= num_lines:
                    return
                await asyncio.sleep(0.01)

    async def end_leases(self, batch: Batch, task: str | None = None) -> None:
        """As when whoever has this task, or any of the batch, had been gone for the length of a lease."""
        work, lease_ms = work_of(batch.batch_id), round(self.config.lease_s * 1000)
        entries: Any = await self.redis.call(lambda redis: redis.xrange(work))
        ids = [entry for entry, fields in entries if task in (None, fields["task"])]
        await self.redis.call(lambda redis: redis.xclaim(work, "workers", "gone", 0, ids, idle=lease_ms, justid=True))

    async def end_leases_of_the_dead(self, batch: Batch) -> None:
        """Of each shard whose worker ended by an error of the runner; until cancelled."""
        while True:
            number = int(await self.runner.raised.get())
            await self.end_leases(batch, str(number // self.config.lines_per_shard))

    async def results(self, batch: Batch, file_id: str) -> list[dict[str, Any]]:
        """The lines of a result file; none when there is none."""
        if not file_id:
            return []
        file = await self.files.get(batch.caller.tenant, file_id)
        content = b"".join([piece async for piece in self.files.read(file)])
        assert len(content) == file.num_bytes
        return [json.loads(line) for line in content.splitlines()]

    async def texts(self, batch: Batch) -> dict[str, str]:
        """Answers by custom_id."""
        lines = await self.results(batch, batch.output_file_id)
        assert len({line["custom_id"] for line in lines}) == len(lines)
        return {line["custom_id"]: line["response"]["body"]["text"] for line in lines}

    async def errors(self, batch: Batch) -> dict[str, str]:
        """Codes of lines without an answer, and statuses of those with an error for one, by custom_id."""
        lines = await self.results(batch, batch.error_file_id)
        return {
            line["custom_id"]: line["error"]["code"] if line["error"] else str(line["response"]["status_code"])
            for line in lines
        }

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"rempart_batch_{name}", labels) or 0.0


def right_texts(numbers: Sequence[int]) -> dict[str, str]:
    """What `texts` must be for these lines."""
    return {f"line-{number}": f"answer to {number}" for number in numbers}
