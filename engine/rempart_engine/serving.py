"""Life of an engine process: start the core, load, serve, drain or fail, leave nothing behind."""

import asyncio
import hashlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path

from rempart_engine.config import EngineConfig
from rempart_engine.core_client import CoreClient
from rempart_engine.front import EngineFront
from rempart_engine.health import EngineHealth
from rempart_engine.ipc import LoadFailed, Loading, Ready, StepUpdate
from rempart_engine.metrics import EngineMetrics
from rempart_engine.server import ENGINE_VERSION, build_server
from rempart_engine.watchdog import SilenceWatch

_log = logging.getLogger(__name__)

_NOTICE_S = 0.5
"""After the core is lost, health answers NOT_SERVING this long before the port closes."""
_STREAMS_END_S = 0.5
"""Streams that have been told their end get this long to deliver it."""
_CORE_STOP_S = 5.0

Announce = Callable[[dict[str, object]], None]


class ExitCode(IntEnum):
    """What the process's exit means."""

    DRAINED = 0
    CORE_LOST = 1
    LOAD_FAILED = 2
    INTERRUPTED = 130


class EngineProcess:
    """One engine, from start to exit code. `announce` gets what the process says on stdout."""

    def __init__(self, config: EngineConfig, core: CoreClient, announce: Announce) -> None:
        self._config = config
        self._core = core
        self._announce = announce
        self._health = EngineHealth()
        self._metrics = EngineMetrics(ENGINE_VERSION, _limits(config))
        self._front = EngineFront(config, core.channel.send, self._metrics)
        self._server = build_server(config, self._front, self._health)
        self._watch = SilenceWatch(config.step_timeout_s)
        self._ready = asyncio.Event()
        self._drain_asked = asyncio.Event()
        self._quit_asked = asyncio.Event()
        self._addresses: dict[str, object] = {}

    async def run(self) -> ExitCode:
        """Serve until drained, interrupted, or the core is lost.

        Raises:
            OSError: an address cannot be listened on.
        """
        await self._health.loading()
        await self._listen()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain_asked.set)
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        async with asyncio.TaskGroup() as tasks:
            beats = [tasks.create_task(self._push_load())]
            lost = [tasks.create_task(self._hear_core()), tasks.create_task(self._watch_core())]
            asked = [tasks.create_task(self._drain_when_asked()), tasks.create_task(self._quit_when_asked())]
            done, _ = await asyncio.wait({*lost, *asked}, return_when=asyncio.FIRST_COMPLETED)
            code = max(task.result() for task in done)
            for task in (*beats, *lost, *asked):
                task.cancel()
        await self._server.stop(0 if code is ExitCode.INTERRUPTED else _STREAMS_END_S)
        await self._end_core(code)
        _log.info("engine exits", extra={"exit_code": int(code)})
        return code

    async def _listen(self) -> None:
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            _require_free(config.host, config.port)
            port = self._server.add_insecure_port(f"{host}:{config.port}")
        except (OSError, RuntimeError) as error:  # gRPC raises the latter
            raise OSError(f"cannot listen on {host}:{config.port}: {error}") from error
        try:
            metrics_port = self._metrics.serve(config.host, config.metrics_port)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{config.metrics_port} for metrics: {error}") from error
        await self._server.start()
        self._addresses = {"address": f"{host}:{port}", "metrics": f"http://{host}:{metrics_port}/metrics"}

    async def _hear_core(self) -> ExitCode:
        async for message in self._core.channel.messages():
            self._watch.heard()
            match message:
                case StepUpdate():
                    self._front.on_step(message)
                case Loading(fraction=fraction):
                    self._metrics.set_loaded(fraction)
                    self._announce({"loading": round(fraction, 4)})
                case Ready():
                    if self._config.require_manifest is not None:
                        self._metrics.set_manifest(_digest(self._config.require_manifest))
                    self._front.on_ready(message)
                    await self._health.ready()
                    self._ready.set()
                    self._announce({"ready": True, **self._addresses})
                case LoadFailed(message=reason):
                    _log.error(f"cannot load {self._config.model}: {reason}")
                    return ExitCode.LOAD_FAILED
        code = await self._core.wait(_NOTICE_S)
        return await self._lose_core(f"engine core died with exit code {code}")

    async def _watch_core(self) -> ExitCode:
        await self._ready.wait()
        ticked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._watch.tick_s)
            now = time.monotonic()
            if self._watch.is_hung(now - ticked_at):
                return await self._lose_core(
                    f"engine core hung: no step in step_timeout_s = {self._config.step_timeout_s:g}"
                )
            ticked_at = now

    async def _lose_core(self, reason: str) -> ExitCode:
        await self._health.core_lost()
        _log.critical(reason)
        self._front.on_core_lost("engine core is lost")
        self._core.kill()
        await asyncio.sleep(_NOTICE_S)
        return ExitCode.CORE_LOST

    async def _drain_when_asked(self) -> ExitCode:
        await self._drain_asked.wait()
        _log.info("draining", extra={"timeout_s": self._config.drain_timeout_s})
        await self._health.draining()
        num_aborted = await self._front.drain(self._config.drain_timeout_s)
        self._front.end_sessions("engine has drained")
        _log.info("drained", extra={"num_aborted": num_aborted})
        return ExitCode.DRAINED

    async def _quit_when_asked(self) -> ExitCode:
        await self._quit_asked.wait()
        return ExitCode.INTERRUPTED

    def _on_interrupt(self) -> None:
        (self._quit_asked if self._drain_asked.is_set() else self._drain_asked).set()

    async def _push_load(self) -> None:
        while True:
            await asyncio.sleep(self._config.load_interval_s)
            self._front.push_load()

    async def _end_core(self, code: ExitCode) -> None:
        if code is ExitCode.DRAINED and self._ready.is_set():
            await self._core.stop(_CORE_STOP_S)
        else:
            self._core.kill()
            await self._core.wait(_CORE_STOP_S)


def _digest(manifest: Path) -> str:
    """Tells manifests apart. The core has read this one and found the model to be as it says."""
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]


def _limits(config: EngineConfig) -> dict[str, int]:
    """The limits that an engine is measured against, by the names of their flags."""
    names = ("max_num_rows", "max_num_waiting", "max_step_tokens", "max_concurrent_rpcs")
    return {name: getattr(config, name) for name in names}


def _require_free(host: str, port: int) -> None:
    """Raises OSError, in plainer words than gRPC's, when the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


async def serve(config: EngineConfig, environ: Mapping[str, str], announce: Announce) -> ExitCode:
    """Run one engine process; its exit code.

    Raises:
        OSError: an address cannot be listened on, or the core cannot be started.
    """
    core = await CoreClient.start(config, environ)
    try:
        return await EngineProcess(config, core, announce).run()
    finally:
        core.kill()
