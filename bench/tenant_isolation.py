"""What a tenant that asks now and then sees beside one that floods: its time to first token, alone and beside it.

    python bench/tenant_isolation.py [--quick] [--json FILE]

    light ──► router 2 ──┐                      ┌──► engine 1: rows, a token of each row a step
                         ├─► one fair queue ────┤
    flood ──► router 1, 2┘    (real Redis)      └──► engine 2

All of a router between its front ends and its engines is real: quotas, fair queue, picking, sessions. The engines keep
a pace instead of computing: a step takes the same time however many rows it has, as on a GPU that decodes. So the ratio
shows what waiting costs, and not how much slower a full batch is. Flood keeps requests at hand for twenty times
its share of the rows. Both halves are measured in turns, in one run, and every answer is checked token by token.
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

from bench.report import describe, percentile, table, this_machine, write_json
from prometheus_client import CollectorRegistry

from rempart_platform.dispatcher import DispatchConfig, Dispatcher
from rempart_platform.endpoints.capacity import Capacity, CapacityRules, capacity_of
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine, hash_token
from rempart_platform.generation import Caller, Delta, GenerationRequest
from rempart_platform.metrics import QueueMetrics, QuotaMetrics, RouterMetrics
from rempart_platform.models import ModelCatalog
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.fair_queue import open_fair_queue
from rempart_platform.tenancy.queue_values import QueueConfig
from rempart_platform.tenancy.quota import QuotaConfig, open_ledger
from rempart_platform.tenancy.redis_client import connect_redis
from rempart_platform.tenancy.testing import patient
from rempart_platform.testing import fake_served_model
from rempart_protos.v1 import engine_pb2, sampling_pb2

_AIM = 1.2
_NUM_ROUTERS, _NUM_ENGINES, _ROWS = 2, 2, 16
_STEP_S = 0.05
_PROMPT_TOKENS_PER_STEP = 32
_FLOODING = 20 * _NUM_ENGINES * _ROWS // 2
"""Requests that flood has at hand: its share is half of the rows."""
_FLOOD_PROMPT, _FLOOD_OUTPUT = (10, 400), (20, 60)
_LIGHT_PROMPT, _LIGHT_OUTPUT = (320, 320), (4, 4)
_LIGHT_PAUSE_S = (0.4, 0.8)
_VOCAB_SIZE = 512


class WrongAnswerError(Exception):
    """An answer is not what the fake model says."""


@dataclass(frozen=True, slots=True)
class Times:
    """To the first token, in milliseconds."""

    case: str
    requests: int
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, case: str, seconds: Sequence[float]) -> "Times":
        milliseconds = [each * 1e3 for each in seconds]
        p50, p90, p99 = (percentile(milliseconds, percent) for percent in (50, 90, 99))
        return cls(case, len(seconds), p50, p90, p99, max(milliseconds))


@asynccontextmanager
async def running_router(
    redis_url: str, engines: Sequence[str], seed: int, rules: CapacityRules
) -> AsyncIterator[Dispatcher]:
    """A router from its dispatcher on, connected to its engines."""
    connected: set[str] = set()
    is_ready = asyncio.Event()
    metrics = RouterMetrics(CollectorRegistry())

    def capacity(model: str) -> Capacity:
        return capacity_of(pool.states(), model, rules)

    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(connect_redis(patient(redis_url)))
        ledger = await stack.enter_async_context(open_ledger(redis, QuotaConfig(), QuotaMetrics(metrics)))

        def changed(_: object) -> None:
            connected.update(state.address for state in pool.states() if state.is_ready)
            if len(connected) == len(engines):
                is_ready.set()

        pool = EnginePool(StaticSource(engines), SessionConfig(), random.Random(seed), changed)
        running = asyncio.create_task(pool.run())
        try:
            await asyncio.wait_for(is_ready.wait(), 30)
            queue_metrics = QueueMetrics(metrics)
            queue = await stack.enter_async_context(open_fair_queue(redis, QueueConfig(), queue_metrics, capacity))
            yield Dispatcher(
                ledger=ledger,
                queue=queue,
                pool=pool,
                catalog=ModelCatalog([fake_served_model(vocab_size=_VOCAB_SIZE)]),
                config=DispatchConfig(cache_secret=b"a secret of the bench"),
                metrics=metrics,
            )
        finally:
            running.cancel()
            await asyncio.wait([running])


class Clients:
    """Ask, check the answers, and keep their times."""

    def __init__(self, routers: Sequence[Dispatcher]) -> None:
        self._routers = routers
        self._rng = random.Random(1)
        self._ids = itertools.count()
        self._flood: list[asyncio.Task[None]] = []
        self._is_flooding = False
        self.num_flood_answers = 0

    async def ask(self, router: Dispatcher, tenant: str, prompts: tuple[int, int], outputs: tuple[int, int]) -> float:
        """Seconds to the first token. Raises WrongAnswerError."""
        prompt = tuple(self._rng.randrange(1, _VOCAB_SIZE) for _ in range(self._rng.randint(*prompts)))
        sampling = sampling_pb2.SamplingParams(
            max_tokens=self._rng.randint(*outputs), seed=next(self._ids), ignore_eos=True
        )
        request = GenerationRequest(f"r{sampling.seed}", Caller(tenant, "key"), "fake", prompt, sampling)
        started, first_s = time.perf_counter(), 0.0
        token_ids: list[int] = []
        async with router.admit(request) as generation:
            async for event in generation.events():
                if isinstance(event, Delta):
                    first_s = first_s or time.perf_counter() - started
                    token_ids += event.token_ids
        asked = engine_pb2.GenerateRequest(prompt_token_ids=prompt, sampling=sampling)
        if token_ids != [hash_token(asked, 0, index, _VOCAB_SIZE) for index in range(sampling.max_tokens)]:
            raise WrongAnswerError(f"request {request.request_id} of {tenant} was answered {token_ids}")
        return first_s

    async def light(self, count: int) -> list[float]:
        """So many requests, one after a pause after the other, whether that has ended or not."""
        asking = []
        for _ in range(count):
            await asyncio.sleep(self._rng.uniform(*_LIGHT_PAUSE_S))
            asking.append(asyncio.create_task(self.ask(self._routers[-1], "light", _LIGHT_PROMPT, _LIGHT_OUTPUT)))
        return await asyncio.gather(*asking)

    async def start_flood(self) -> None:
        """Returns when all rows have changed hands twice."""
        self._is_flooding = True
        self._flood = [
            asyncio.create_task(self._keep_asking(self._routers[number % len(self._routers)]))
            for number in range(_FLOODING)
        ]
        before = self.num_flood_answers
        while self.num_flood_answers < before + 2 * _NUM_ENGINES * _ROWS:
            self._raise_failures()
            await asyncio.sleep(_STEP_S)

    async def stop_flood(self) -> None:
        """Raises WrongAnswerError and what else went wrong there."""
        self._raise_failures()
        self._is_flooding = False  # a cancellation alone may be lost in a call of Redis
        for task in self._flood:
            task.cancel()
        await asyncio.wait(self._flood)

    async def _keep_asking(self, router: Dispatcher) -> None:
        while self._is_flooding:
            await self.ask(router, "flood", _FLOOD_PROMPT, _FLOOD_OUTPUT)
            self.num_flood_answers += 1

    def _raise_failures(self) -> None:
        for task in self._flood:
            if task.done():
                task.result()


async def run(num_rounds: int, num_asked: int, rules: CapacityRules) -> tuple[Times, Times]:
    """Alone and beside, so many requests a round."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        engines = [
            FakeEngine(step_s=_STEP_S, prompt_tokens_per_step=_PROMPT_TOKENS_PER_STEP, rows=_ROWS)
            for _ in range(_NUM_ENGINES)
        ]
        addresses = [(await stack.enter_async_context(engine)).address for engine in engines]
        routers = [
            await stack.enter_async_context(running_router(redis.url, addresses, seed, rules))
            for seed in range(_NUM_ROUTERS)
        ]
        clients = Clients(routers)
        alone: list[float] = []
        beside: list[float] = []
        for _ in range(num_rounds):
            alone += await clients.light(num_asked)
            await clients.start_flood()
            beside += await clients.light(num_asked)
            await clients.stop_flood()
    return Times.of("alone", alone), Times.of(f"beside {_FLOODING} requests of a flood", beside)


def show(times: Sequence[Times]) -> str:
    head = ("time to first token, ms", "requests", "p50", "p90", "p99", "most")
    rows = [
        (each.case, str(each.requests), *(f"{value:.0f}" for value in (each.p50, each.p90, each.p99, each.most)))
        for each in times
    ]
    return table(head, rows)


def main() -> None:
    """Measures, prints, and fails when an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few requests: only shows that it runs")
    parser.add_argument("--reserve", type=float, default=CapacityRules().reserve, help="as `rempart router` has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all numbers there")
    args = parser.parse_args()
    machine = this_machine()
    num_rounds, num_asked = (1, 20) if args.quick else (3, 70)
    rules = CapacityRules(reserve=args.reserve)
    alone, beside = asyncio.run(run(num_rounds, num_asked, rules))
    ratio = beside.p99 / alone.p99
    print(f"# A light tenant beside a flood\n\n{describe(machine)}\n\n{show((alone, beside))}\n")
    print(f"p99 beside / p99 alone: {ratio:.2f}; aim: {_AIM}. Reserve: {args.reserve}.")
    if args.json is not None:
        times = [asdict(alone), asdict(beside)]
        write_json(args.json, machine, {"tenant_isolation": times, "p99_ratio": ratio, **asdict(rules)})


if __name__ == "__main__":
    main()
