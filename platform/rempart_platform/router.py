"""A router process: builds every room of the house, serves, and on a stop drains.

signal ─► not ready ─► (drain_delay_s) ─► no new requests ─► running streams end, at most drain_timeout_s ─► closed
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from rempart_platform.apis.admin import AdminServicer
from rempart_platform.apis.batch_grpc import BatchesServicer
from rempart_platform.apis.grpc import InferenceServicer
from rempart_platform.apis.line_runner import OnlineLineRunner
from rempart_platform.apis.openai import build_app
from rempart_platform.apis.services import ApiServices
from rempart_platform.audit.log import AuditLog, open_audit_log
from rempart_platform.batch.callers import BatchCallers
from rempart_platform.batch.service import BatchService
from rempart_platform.cluster.open_leadership import open_leadership
from rempart_platform.config import RouterConfig, RouterSecrets, config_digest
from rempart_platform.discovery_metrics import DiscoveryMetrics
from rempart_platform.dispatcher import DispatchConfig, Dispatcher
from rempart_platform.endpoints.capacity import Capacities
from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.source import EndpointSource
from rempart_platform.engine_source import open_source
from rempart_platform.holding import HoldingRoom
from rempart_platform.metrics import EndpointCollector, QueueMetrics, QuotaMetrics, RouterMetrics
from rempart_platform.model_sync import load_catalog, sync_model
from rempart_platform.models import ModelCatalog
from rempart_platform.oidc.authenticator import Gates, TenantMemory, open_gates
from rempart_platform.process_metrics import RouterState, register_process_metrics
from rempart_platform.readiness import Readiness
from rempart_platform.servers import grpc_server, http_server, metrics_server
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyHasher
from rempart_platform.tenancy.authenticators import AdminAuthenticator, Authenticator
from rempart_platform.tenancy.fair_queue import FairQueue, open_fair_queue
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import PriceRegistry
from rempart_platform.tenancy.queue_values import QueueConfig
from rempart_platform.tenancy.quota import open_ledger
from rempart_platform.tenancy.redis_client import RedisClient, RedisConfig, connect_redis
from rempart_platform.tenancy.seed import Seed, apply_seed, tell_nobody
from rempart_platform.tenancy.standings import StandingAuthenticator, Standings
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.tenants_file import read_seed
from rempart_platform.tenancy.usage import UsageReader

Announce = Callable[[dict[str, object]], None]


async def serve(config: RouterConfig, secrets: RouterSecrets, announce: Announce, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains.

    Args:
        config: everything else.
        secrets: keys and where Redis is.
        announce: told once, when requests can be served: ready, http, grpc, metrics.
        stop: ends the router.

    Raises:
        OSError, RuntimeError, ValueError: it cannot start: a port is taken, or a model's tokenizer or the tenants' file
            cannot be read.
    """
    catalog = load_catalog(config.models, int(time.time()), config.aliases)
    seed = _read_seed(config)
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, config.max_tenant_labels)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(connect_redis(_redis_config(config, secrets)))
        hasher = KeyHasher(secrets.key_pepper)
        keys = ApiKeyStore(redis, hasher)
        audit = await stack.enter_async_context(open_audit_log(config.audit, redis, registry, config_digest(config)))
        if seed is not None:
            await _sow(apply_seed(redis, seed, keys, audit.seeding if audit else tell_nobody), stop)
        ledger = await stack.enter_async_context(open_ledger(redis, config.quota, QuotaMetrics(metrics)))
        leadership = await stack.enter_async_context(open_leadership(config, registry))
        if audit is not None and audit.retention is not None:
            await stack.enter_async_context(_running(audit.retention.run(leadership.is_leader)))
        source = await stack.enter_async_context(open_source(config, DiscoveryMetrics(registry)))
        pool, readiness, holding = _build_pool(config, catalog, source, metrics)
        registry.register(EndpointCollector(pool.states))
        state = RouterState(readiness.is_ready, lambda: redis.is_available)
        loop_lag = register_process_metrics(registry, config, state)
        queue = await stack.enter_async_context(_open_queue(redis, config.queue, metrics, pool))
        by_key = Gates(Authenticator(keys, hasher), AdminAuthenticator(secrets.admin_key))
        gates = await stack.enter_async_context(open_gates(config.oidc, by_key, TenantRegistry(redis)))
        standings = Standings(redis, time.monotonic)
        dispatch = DispatchConfig(
            secrets.cache_secret, max_attempts=config.max_attempts, default_timeout_s=config.default_timeout_s
        )
        batch = BatchService(redis, config.batch, registry) if config.batch.store else None
        services = ApiServices(
            authenticator=StandingAuthenticator(gates.tenants, standings),
            catalog=catalog,
            dispatcher=Dispatcher(
                ledger=ledger,
                queue=queue,
                audit=audit,
                holding=holding,
                pool=pool,
                catalog=catalog,
                config=dispatch,
                metrics=metrics,
            ),
            limits=config.limits,
            http=config.http,
            is_ready=readiness.is_ready,
            files=batch.files if batch is not None else None,
            batches=batch.batches if batch is not None else None,
            batch_limits=config.batch.limits,
        )
        admin = _build_admin(redis, keys, gates, audit, _alias_names(config))
        inference = InferenceServicer(services, config.grpc)
        batches = BatchesServicer(services, config.grpc)
        metrics_url = await stack.enter_async_context(metrics_server(registry, config))
        await stack.enter_async_context(_running(pool.run(), readiness.run(redis), loop_lag.watch()))
        http, http_url = await stack.enter_async_context(http_server(build_app(services), config))
        grpc_address = await stack.enter_async_context(grpc_server(inference, batches, admin, readiness, config))
        if batch is not None:
            runner = OnlineLineRunner(services, BatchCallers(keys, standings, TenantMemory(TenantRegistry(redis)).has))
            await stack.enter_async_context(batch.working(runner, catalog.has, leadership.is_leader))
        line = {"ready": True, "http": http_url, "grpc": grpc_address, "metrics": metrics_url}
        async with _running(_announce_when_ready(readiness, announce, line)):
            await stop.wait()
        await readiness.drain()
        await asyncio.sleep(config.drain_delay_s)
        http.should_exit = True  # both front ends drain at the same time: gRPC when the stack unwinds, now


def _read_seed(config: RouterConfig) -> Seed | None:
    if not config.tenants_file:
        return None
    return read_seed(Path(config.tenants_file), aliases=_alias_names(config))


def _alias_names(config: RouterConfig) -> list[str]:
    return [alias.name for alias in config.aliases]


async def _sow(seed: Coroutine[None, None, None], stop: asyncio.Event) -> None:
    """Waits until Redis has taken the seed, but not beyond a stop."""
    async with asyncio.TaskGroup() as tasks:
        sowing, stopping = tasks.create_task(seed), tasks.create_task(stop.wait())
        await asyncio.wait({sowing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sowing, stopping):
            task.cancel()


async def _announce_when_ready(readiness: Readiness, announce: Announce, line: dict[str, object]) -> None:
    await readiness.wait_until_ready()
    announce(line)


def _redis_config(config: RouterConfig, secrets: RouterSecrets) -> RedisConfig:
    return RedisConfig(
        secrets.redis_url,
        timeout_s=config.redis_timeout_s,
        max_connections=config.redis_max_connections,
    )


def _build_pool(
    config: RouterConfig, catalog: ModelCatalog, source: EndpointSource, metrics: RouterMetrics
) -> tuple[EnginePool, Readiness, HoldingRoom | None]:
    def take_change(changed: EndpointState) -> None:
        sync_model(catalog, changed, pool.states())
        readiness.check()
        if holding is not None:
            holding.check()

    def can_take_requests() -> bool:
        # Where requests are held a router serves without engines: else nothing would reach it and wake one.
        return any(pool.is_served(model.name) for model in catalog.all()) or (holding is not None and pool.has_synced)

    pool = EnginePool(
        source,
        config.session,
        random.Random(),
        take_change,
        on_sync=lambda: readiness.check(),  # noqa: PLW0108 - it is made below
        picking=config.pick,
    )
    metrics.scaling.expose(model.name for model in config.models)
    holds = config.hold.without_engine_s > 0
    holding = HoldingRoom(config.hold, pool.is_served, metrics.scaling.held) if holds else None
    readiness = Readiness(can_take_requests)
    return pool, readiness, holding


@asynccontextmanager
async def _open_queue(
    redis: RedisClient, config: QueueConfig, metrics: RouterMetrics, pool: EnginePool
) -> AsyncIterator[FairQueue | None]:
    capacities = Capacities(pool.states, config.capacity, time.monotonic)
    if config.mode == "off":
        yield None
    else:
        async with open_fair_queue(redis, config, QueueMetrics(metrics), capacities.of) as queue:
            yield queue


def _build_admin(
    redis: RedisClient, keys: ApiKeyStore, gates: Gates, audit: AuditLog | None, aliases: Collection[str]
) -> AdminServicer:
    tenants = TenantRegistry(redis)
    return AdminServicer(
        gates.admins,
        tenants,
        keys,
        UsageReader(redis, tenants),
        PlanRegistry(redis),
        PriceRegistry(redis),
        audit,
        aliases,
    )


@asynccontextmanager
async def _running(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Runs these beside the block; leaving it cancels them, and one that fails ends the block."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(coroutine) for coroutine in coroutines]
        try:
            yield
        finally:
            for task in running:
                task.cancel()
