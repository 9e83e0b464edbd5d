"""The routers that are measured, each as a process of its own on one core, in front of one backend.

Peers are run as their own documentation says, with one process and what they need to do the same work: LiteLLM with a
master key, which it checks; vllm-router knows neither keys nor limits.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench.clients import HttpClient
from bench.conversation import Conversation, WrongOutputError
from bench.router_rig import RigError, cpu_s, end_of_log, running_router, starting_on, stop_process
from bench.routers_backend import MODEL

PEER_PACKAGES = ("litellm[proxy]", "vllm-router")
_READY_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 5.0
_INSTALL_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Contestant:
    """A router that serves. `pid` leads a session of its own."""

    name: str
    port: int
    key: str
    pid: int

    def stop(self) -> None:
        """It gets no core until it may go on."""
        _signal_all(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Safe to repeat."""
        _signal_all(self.pid, signal.SIGCONT)

    async def wait_until_right(self, asked: Conversation) -> None:
        """Until it has answered this rightly. Raises RigError."""
        await _wait_until_right(self.port, self.key, asked)

    def cpu_s(self) -> float:
        """CPU seconds so far, of all its processes."""
        leader = psutil.Process(self.pid)
        return sum(cpu_s(process) for process in (leader, *leader.children(recursive=True)))


@asynccontextmanager
async def rempart(tokenizer: Path, engine_address: str, cores: Collection[int]) -> AsyncIterator[Contestant]:
    """Ours: keys, quotas, fair queue, settling, audit log, metrics and logs, all switched on."""
    async with running_router(tokenizer, {MODEL: engine_address}, cores=cores) as rig:
        (pid,) = rig.pids["router"]
        yield Contestant("Rempart", rig.http_port, rig.key, pid)


@asynccontextmanager
async def litellm(
    venv: Path, backend_port: int, asked: Conversation, cores: Collection[int]
) -> AsyncIterator[Contestant]:
    """With a master key; it has no limits without a database of its own."""
    key, port = f"sk-{secrets.token_hex(24)}", _free_port()
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{backend_port}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
        "general_settings": {"master_key": key},
        "litellm_settings": {"telemetry": False},
    }
    with tempfile.TemporaryDirectory(prefix="rempart-bench-") as folder:
        path = Path(folder) / "litellm.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        args = [str(venv / "bin" / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
        environ = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        async with _peer("LiteLLM", args, environ, port, key, asked, cores) as contestant:
            yield contestant


@asynccontextmanager
async def vllm_router(
    venv: Path, backend_port: int, asked: Conversation, cores: Collection[int]
) -> AsyncIterator[Contestant]:
    """Hands on what it is sent; in Rust."""
    port = _free_port()
    args = [str(venv / "bin" / "vllm-router"), "--worker-urls", f"http://127.0.0.1:{backend_port}"]
    args += ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    args += ["--prometheus-port", str(_free_port())]
    async with _peer("vllm-router", args, {}, port, "none", asked, cores) as contestant:
        yield contestant


@asynccontextmanager
async def peers_folder(given: Path | None) -> AsyncIterator[Path]:
    """A virtual environment with the peers: the given one, or one that is made now and thrown away at the end.

    What cannot be installed is missing there.
    """
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="rempart-peers-", ignore_cleanup_errors=True) as folder:
        venv = Path(folder)
        await _run("python3", "-m", "venv", str(venv))
        for package in PEER_PACKAGES:
            await _run(str(venv / "bin" / "pip"), "install", "--quiet", package)
        yield venv


def peer_versions(venv: Path) -> dict[str, str]:
    """Of the peers that are installed there."""
    listed = subprocess.run(
        [venv / "bin" / "pip", "list", "--format", "json"], capture_output=True, text=True, check=True, timeout=60
    )
    names = {package.partition("[")[0] for package in PEER_PACKAGES}
    return {item["name"]: item["version"] for item in json.loads(listed.stdout) if item["name"] in names}


async def _run(*args: str) -> None:
    """A package that cannot be installed is told of later, as one that is missing."""
    process = await asyncio.create_subprocess_exec(*args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(_INSTALL_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        await stop_process(process)


@asynccontextmanager
async def _peer(
    name: str,
    args: Sequence[str],
    environ: Mapping[str, str],
    port: int,
    key: str,
    asked: Conversation,
    cores: Collection[int],
) -> AsyncIterator[Contestant]:
    with tempfile.TemporaryFile("w+") as log:
        with starting_on(cores):
            process = await asyncio.create_subprocess_exec(
                *args, stdout=log, stderr=log, env=os.environ | environ, start_new_session=True
            )
        try:
            try:
                await _wait_until_right(port, key, asked)
            except RigError as error:
                raise RigError(f"{name}: {error}\n{end_of_log(log)}") from error
            yield Contestant(name, port, key, process.pid)
        finally:
            _signal_all(process.pid, signal.SIGCONT)
            await stop_process(process)
            _signal_all(process.pid, signal.SIGKILL)


def _signal_all(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(pid, number)


async def _wait_until_right(port: int, key: str, asked: Conversation) -> None:
    reason = "no answer"
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while True:
                try:
                    client = await HttpClient.connect(port, MODEL, key, stream=False)
                    try:
                        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                            (await client.ask(asked)).check()
                        return
                    finally:
                        await client.close()
                except (OSError, WrongOutputError) as error:
                    reason = str(error)
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise RigError(f"not ready after {_READY_TIMEOUT_S:.0f} s: {reason}") from None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
