"""The engine core as its front sees it: a child process and a channel."""

import asyncio
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from os import getpid

from rempart_engine.config import EngineConfig
from rempart_engine.ipc import Configure, FrontChannel, Stop, socket_pair

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Read by numerical libraries when they are imported, so they must be set before the process starts."""
_WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPIN_COUNT = "1000"
"""OpenMP threads that wait for one another by spinning take a shared core from the very thread they wait for:
measured 20 to 60 times slower, where not spinning costs a fifth at most. An engine with cores of its own may set one
of these variables itself."""
_FUSION = {"TRITON_DEFAULT_FP_FUSION": "1"}
"""Triton's default changes from version to version: products and sums are fused here, as kernels are compiled in CI."""


class CoreClient:
    """One engine core. Its owner must end with `stop` or `kill`, and `wait`."""

    def __init__(self, process: Process, channel: FrontChannel) -> None:
        self.channel = channel
        self._process = process

    @classmethod
    async def start(cls, config: EngineConfig, environ: Mapping[str, str]) -> "CoreClient":
        """Start the process and have it load the model; its channel says how that goes."""
        front_end, core_end = socket_pair()
        with core_end:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "rempart_engine.core_process",
                str(core_end.fileno()),
                str(getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,  # stdout belongs to the front's announcements
                pass_fds=(core_end.fileno(),),
                env=core_environ(environ, config.num_threads),
            )
        channel = await FrontChannel.open(front_end)
        channel.send(Configure(config))
        return cls(process, channel)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End the process whatever it does; nothing happens when it has ended."""
        if self._process.returncode is None:
            self._process.kill()

    async def wait(self, timeout_s: float) -> int:
        """Exit code, negative for a signal; a process that has not ended by then is killed."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()
        finally:
            self.channel.close()

    async def stop(self, timeout_s: float) -> int:
        """Ask the process to end; the exit code."""
        self.channel.send(Stop())
        return await self.wait(timeout_s)


def core_environ(environ: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """The front's environment, with what numerical libraries read from it."""
    waits = {} if any(name in environ for name in _WAIT_VARIABLES) else {"GOMP_SPINCOUNT": _SPIN_COUNT}
    return {**_FUSION, **environ, **waits, **dict.fromkeys(_THREAD_VARIABLES, str(num_threads))}
