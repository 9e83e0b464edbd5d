"""`rempart up`: the whole platform on one machine.

    the model is as its manifest says, if one is required ─►
    embedded Redis ─► engines load, in parallel ─► router over them ─► demo tenant and key ─► told that it is ready
                                         ... until asked to stop, or until one of them dies ...
    router drains ─► engines drain ─► Redis ends

Signals reach this process alone; it ends the others in order. Should it be killed, they die with it.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

from rempart_platform.console.admin_client import open_admin
from rempart_platform.local.child_process import ChildObserver, Children
from rempart_platform.local.config import (
    LocalConfig,
    LocalSecrets,
    engine_command,
    require_audit_store,
    require_free_ports,
    router_command,
    verify_command,
)
from rempart_platform.tenancy.embedded import EmbeddedRedis, EmbeddedRedisConfig, embedded_redis

DEMO_TENANT = "demo"
_DRAIN_S = 45.0
"""What engines and routers grant their running streams by themselves, and some."""
_CLEAN_UP_S = 5.0
"""When the platform is broken, nobody waits long for its end."""


@dataclass(frozen=True, slots=True)
class RunningPlatform:
    """Where everything is."""

    model_name: str
    http: str
    grpc: str
    metrics: str
    engines: tuple[str, ...]
    engine_metrics: tuple[str, ...]
    api_key: str = field(repr=False)
    admin_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class StopRequests:
    """What a person at the console wants: an end, and then an end at once."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self) -> None:
        """The first time drains; any later time does not wait for that."""
        (self.at_once if self.drain.is_set() else self.drain).set()


class LocalPlatform:
    """One run.

    Args:
        config: what to start.
        environ: the environment of its processes.
        observer: told what they say.
    """

    def __init__(self, config: LocalConfig, environ: Mapping[str, str], observer: ChildObserver) -> None:
        self._config = config
        self._environ = environ
        self._observer = observer

    async def run(self, announce: Callable[[RunningPlatform], None], stop: StopRequests) -> str | None:
        """Runs until asked to stop, and leaves nothing behind.

        Args:
            announce: told once, when requests can be served.
            stop: ends it, also while it starts.

        Returns:
            None after an orderly end; otherwise which of its processes died, and why: also the one that finds the
            model to be another than its manifest says.

        Raises:
            LocalConfigError: a port is taken, or the audit log cannot be where it is to be.
            EmbeddedRedisError: Redis is not installed or does not start.
            grpc.aio.AioRpcError: the router makes no demo tenant.
            OSError: nobody can be told.
        """
        require_free_ports(self._config)
        require_audit_store(self._config)
        refusal = await self._refusal(stop)
        if refusal is not None or stop.drain.is_set():
            return refusal
        async with _state() as (redis, batch_folder), asyncio.TaskGroup() as tasks:
            engines, router = Children(tasks, self._observer), Children(tasks, self._observer)
            # In no group: should it fail, the others must live on to end in order.
            serving = asyncio.create_task(self._serve(redis, batch_folder, engines, router, announce))
            deaths = [tasks.create_task(_first_death(children)) for children in (engines, router)]
            deaths.append(tasks.create_task(_redis_death(redis)))
            asked = tasks.create_task(stop.drain.wait())
            try:
                await asyncio.wait({serving, asked, *deaths}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                died = [task.result() for task in deaths if task.done()]
                is_broken = bool(died) or serving.done()
                for task in (serving, asked, *deaths):
                    task.cancel()
                await asyncio.wait({serving})  # from here on, no child is started
                async with _hurried(stop, engines, router):
                    for children in (router, engines):
                        await children.stop(_CLEAN_UP_S if is_broken else _DRAIN_S)
        failure = None if serving.cancelled() else serving.exception()
        if failure is not None and not died:
            raise failure
        return died[0] if died else None

    async def _refusal(self, stop: StopRequests) -> str | None:
        """Why the model must not be parsed; None when it may be, or when asked to stop before that is known."""
        command = verify_command(self._config, self._environ)
        if command is None:
            return None
        async with asyncio.TaskGroup() as tasks:
            verifying = Children(tasks, self._observer)
            await verifying.start(command)
            ended, asked = tasks.create_task(verifying.first_death()), tasks.create_task(stop.drain.wait())
            try:
                await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                verifying.kill()
                asked.cancel()
        self._observer.ready(command.name)
        end = ended.result()
        return None if end.exit_code == 0 or stop.drain.is_set() else str(end)

    async def _serve(
        self,
        redis: EmbeddedRedis,
        batch_folder: Path,
        engines: Children,
        router: Children,
        announce: Callable[[RunningPlatform], None],
    ) -> Never:
        """Until cancelled."""
        config, own_secrets = self._config, LocalSecrets()
        started = [
            await engines.start(engine_command(config, number, self._environ))
            for number in range(1, config.num_engines + 1)
        ]
        ready = [await engine.wait_until_ready() for engine in started]
        addresses = tuple(engine.address for engine in ready)
        command = router_command(config, addresses, redis.url, batch_folder, own_secrets, self._environ)
        at = await (await router.start(command)).wait_until_ready()
        async with open_admin(at.grpc, own_secrets.admin_key) as admin:
            if DEMO_TENANT not in [tenant.name for tenant in await admin.list_tenants()]:  # else of the tenants' file
                await admin.create_tenant(DEMO_TENANT)
            issued = await admin.issue_key(DEMO_TENANT)
        announce(
            RunningPlatform(
                model_name=config.model_name,
                http=at.http,
                grpc=at.grpc,
                metrics=at.metrics,
                engines=addresses,
                engine_metrics=tuple(engine.metrics for engine in ready),
                api_key=issued.key,
                admin_key=own_secrets.admin_key,
            )
        )
        while True:
            await asyncio.Event().wait()


@asynccontextmanager
async def _state() -> AsyncIterator[tuple[EmbeddedRedis, Path]]:
    """All that the platform remembers, for as long as it runs: Redis, and a folder for files of batch jobs."""
    with tempfile.TemporaryDirectory(prefix="rempart-batch-", ignore_cleanup_errors=True) as folder:
        async with embedded_redis(EmbeddedRedisConfig()) as redis:
            yield redis, Path(folder)


async def _first_death(children: Children) -> str:
    return str(await children.first_death())


async def _redis_death(redis: EmbeddedRedis) -> str:
    return await redis.death()


@asynccontextmanager
async def _hurried(stop: StopRequests, *groups: Children) -> AsyncIterator[None]:
    """Whoever does not want to wait for the block ends the children at once."""

    async def hurry() -> None:
        await stop.at_once.wait()
        for children in groups:
            children.kill()

    async with asyncio.TaskGroup() as tasks:
        hurrying = tasks.create_task(hurry())
        yield
        hurrying.cancel()
