"""Who is served how much, over engines in simulated time."""

import itertools
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from rempart_platform.endpoints.capacity import Capacity
from rempart_platform.generation import ServiceTier, Usage
from rempart_platform.tenancy.fair_queue import FairQueue
from rempart_platform.tenancy.queue_testing import RecordingQueueObserver, SimulatedEngines, jain
from rempart_platform.tenancy.queue_values import QueueConfig, QueueRequest
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

MODEL = "m"
ROWS, TOKENS_PER_S = 8, 1250.0  # a row; 10,000 of all
ROOM = Capacity(ROWS, 10**9)
CONFIG = QueueConfig(output_weight=2.0, ageing_s=3600.0, lease_s=3600.0, capacity_s=3600.0)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


def queues_of(
    redis: RedisClient, count: int, config: QueueConfig = CONFIG, capacity: Capacity = ROOM
) -> list[FairQueue]:
    """Of that many routers."""
    return [FairQueue(redis, config, RecordingQueueObserver(), lambda model: capacity) for _ in range(count)]


class Load:
    """Requests with ids of their own."""

    def __init__(self, engines: SimulatedEngines, seed: int, config: QueueConfig = CONFIG) -> None:
        self._engines = engines
        self._rng = random.Random(seed)
        self._ids = itertools.count()
        self._config = config

    async def bring(
        self,
        queue: FairQueue,
        tenant: str,
        prompts: tuple[int, int],
        *,
        overestimate: float = 1.0,
        service_tier: ServiceTier = ServiceTier.DEFAULT,
        weight: float = 1.0,
    ) -> None:
        """One request, whose prompt has a length in that range, half of it cached at times."""
        num_prompt, num_output = self._rng.randint(*prompts), self._rng.randint(1, 400)
        usage = Usage(num_prompt, num_output, self._rng.choice((0, num_prompt // 2)))
        request = QueueRequest(
            f"{tenant}-{next(self._ids)}",
            tenant,
            MODEL,
            num_prompt_tokens=num_prompt,
            num_output_tokens=round(num_output * overestimate),
            service_tier=service_tier,
            weight=weight,
        )
        await self._engines.ask(queue, request, usage, self._config.charge(usage))


def windows(engines: SimulatedEngines, length_s: float, step_s: float) -> Sequence[dict[str, float]]:
    """What everyone was served in every window, after the first seconds."""
    starts = itertools.takewhile(lambda start: start + length_s <= engines.now_s, itertools.count(5.0, step_s))
    return [engines.tokens_by_tenant(start, start + length_s) for start in starts]


@pytest.mark.parametrize("reserved_rows", [0, 1])
async def test_weights_of_4_to_1_hold_when_the_heavy_tenant_knows_one_router_only(
    redis: RedisClient, reserved_rows: int
) -> None:
    first, second = queues = queues_of(redis, 2, capacity=Capacity(ROWS, 10**9, reserved_rows))
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=1)
    for number in range(600):
        await load.bring(first, "heavy", (10, 2000), overestimate=3.0, weight=4.0)
        if number % 4 == 0:
            await load.bring(second if number % 8 else first, "light", (10, 2000))
    while engines.now_s < 70:
        assert await engines.step()
    for queue in queues:
        assert queue.num_waiting > 0  # both had work all the time: one is on the first router, the other on both
    served = engines.tokens_by_tenant(5.0, 65.0)
    assert served["heavy"] / served["light"] == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize("reserved_rows", [0, 1])
async def test_eight_equal_tenants_get_equal_tokens_in_any_minute_whatever_they_send(
    redis: RedisClient, reserved_rows: int
) -> None:
    queues = queues_of(redis, 2, capacity=Capacity(ROWS, 10**9, reserved_rows))
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=2)
    # From many short requests to few long ones; some say what they need, others ten times as much.
    prompts = {f"t{number}": (10, longest) for number, longest in enumerate((10, 50, 200, 800, 2000, 4000, 8000, 8000))}
    for number, (tenant, lengths) in enumerate(prompts.items()):
        mean_charge = 0.75 * sum(lengths) / 2 + CONFIG.output_weight * 200
        for _ in range(round(140 * TOKENS_PER_S * 1.1 / mean_charge)):
            await load.bring(queues[number % 2], tenant, lengths, overestimate=10.0 if number in (1, 6) else 1.0)
    while engines.now_s < 130:
        assert await engines.step()
    shares = windows(engines, length_s=60.0, step_s=2.5)
    assert len(shares) > 20
    assert min(jain(list(share.values())) for share in shares) >= 0.98
    assert all(len(share) == 8 for share in shares)


async def test_a_light_tenant_beside_a_flood_gets_the_next_row_that_is_free(redis: RedisClient) -> None:
    queues = queues_of(redis, 2)
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=3)
    for _ in range(400):
        await load.bring(queues[0], "flood", (10, 2000))
    overtaken = []
    for _ in range(12):
        for _ in range(20):
            await engines.step()
        num_before = len(engines.granted_tenants)
        await load.bring(queues[1], "light", (10, 500))
        while "light" not in engines.granted_tenants[num_before:]:
            await engines.step()
        overtaken.append(engines.granted_tenants[num_before:].index("light"))
    assert max(overtaken) == 0


async def times_to_first_token(redis: RedisClient, capacity: Capacity, num_flooding: int) -> list[float]:
    """Of a tenant that asks now and then, in order of length: its waits and the prefill of its prompts of 500 tokens.

    Beside it, one keeps so many requests waiting or running.
    """
    queues = queues_of(redis, 3, capacity=capacity)
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=8)
    prefill_s, num_asked = 500 / TOKENS_PER_S, 0
    for number in range(num_flooding):
        await load.bring(queues[number % 2], "flood", (10, 4000), overestimate=2.0)
    for _ in range(300):
        # Half of its share: about one of eight rows.
        await engines.run_until(engines.now_s + 1.5)
        num_ended = sum(service.tenant == "flood" for service in engines.served)
        while num_flooding and num_asked < num_ended:
            await load.bring(queues[num_asked % 2], "flood", (10, 4000), overestimate=2.0)
            num_asked += 1
        await load.bring(queues[2], "light", (500, 500))
    while engines.now_s < 1e6 and sum(service.tenant == "light" for service in engines.served) < 300:
        assert await engines.step()
    return sorted(service.waited_s + prefill_s for service in engines.served if service.tenant == "light")


@pytest.mark.parametrize(("reserved_rows", "is_kept"), [(2, True), (0, False)])
async def test_a_light_tenant_sees_its_first_token_beside_a_flood_as_if_alone(
    redis: RedisClient, reserved_rows: int, is_kept: bool
) -> None:
    capacity = Capacity(ROWS, 10**9, reserved_rows)
    alone = await times_to_first_token(redis, capacity, num_flooding=0)
    await redis.call(lambda each: each.flushall())
    beside = await times_to_first_token(redis, capacity, num_flooding=20 * ROWS // 2)
    p99 = 0.99 * len(alone)
    assert (beside[int(p99)] <= 1.2 * alone[int(p99)]) is is_kept, "and it is the reserve that does it"


async def test_an_idle_tenant_saves_nothing_up(redis: RedisClient) -> None:
    (queue,) = queues = queues_of(redis, 1)
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=4)
    for _ in range(500):
        await load.bring(queue, "busy", (500, 1500))
    for _ in range(200):
        await engines.step()
    returned_s = engines.now_s
    for _ in range(200):
        await load.bring(queue, "returned", (500, 1500))
    while engines.now_s < returned_s + 30:
        assert await engines.step()
    shares = engines.tokens_by_tenant(returned_s + 3, returned_s + 30)
    assert jain(list(shares.values())) > 0.995


async def test_a_tenant_that_asks_for_much_and_uses_little_pays_for_what_it_uses(redis: RedisClient) -> None:
    (queue,) = queues = queues_of(redis, 1)
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=5)
    for _ in range(300):
        await load.bring(queue, "modest", (100, 1000))
        await load.bring(queue, "greedy", (100, 1000), overestimate=20.0)
    while engines.now_s < 40:
        assert await engines.step()
    assert jain(list(engines.tokens_by_tenant(5, 40).values())) > 0.99


async def test_classes_are_served_in_their_order(redis: RedisClient) -> None:
    (queue,) = queues = queues_of(redis, 1)
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=6)
    for _ in range(ROWS):
        await load.bring(queue, "running", (10, 1000))
    for service_tier in (ServiceTier.BATCH, ServiceTier.DEFAULT, ServiceTier.FLEX, ServiceTier.PRIORITY):
        for _ in range(3):
            await load.bring(queue, service_tier.name.lower(), (10, 1000), service_tier=service_tier)
    while await engines.step():
        pass
    names = [name for name in ("priority", "default", "flex", "batch") for _ in range(3)]
    assert engines.granted_tenants == ["running"] * ROWS + names


async def test_with_age_the_lowest_class_is_served_beside_a_flood_of_the_highest(redis: RedisClient) -> None:
    config = QueueConfig(ageing_s=0.0, lease_s=3600.0, capacity_s=3600.0)
    (queue,) = queues = queues_of(redis, 1, config)
    engines = SimulatedEngines(queues, MODEL, TOKENS_PER_S)
    load = Load(engines, seed=7, config=config)
    for _ in range(3 * ROWS):
        await load.bring(queue, "urgent", (10, 1000), service_tier=ServiceTier.PRIORITY)
    await load.bring(queue, "patient", (10, 1000), service_tier=ServiceTier.BATCH)
    for _ in range(4):
        await load.bring(queue, "urgent", (10, 1000), service_tier=ServiceTier.PRIORITY)
        await engines.step()
    assert "patient" in engines.granted_tenants
    assert queue.num_waiting > 2 * ROWS  # of those that are of the highest class
