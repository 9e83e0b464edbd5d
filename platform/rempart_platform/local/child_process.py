"""The processes of `rempart up`: each says in JSON lines on stdout how it is, and logs on stderr.

They die with their parent, whatever ends it. Each has a session of its own: Ctrl-C in a terminal reaches the parent
alone, which stops them in order.
"""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

_NUM_LAST_LOG_LINES = 20
_MAX_LINE_BYTES = 1 << 24
_PIPES_END_S = 2.0
"""After a child has ended, what it wrote is read for at most this long."""
# Makes a process end with the one that started it, even by SIGKILL; then becomes the command. Done in a fresh
# interpreter and not between fork and exec, where a process with threads may run nothing.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """The command, wrapped so that its process ends with this one; outside Linux, the command as it is."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """A Python module to run as a child."""

    name: str
    """For people: "engine 1"."""
    module: str
    args: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)
    """Its whole environment."""


@dataclass(frozen=True, slots=True)
class ChildDeath:
    """A child that ended and was not asked to."""

    name: str
    exit_code: int
    """Negative for a signal."""
    last_log_lines: tuple[str, ...]

    def __str__(self) -> str:
        how = f"was killed by signal {-self.exit_code}" if self.exit_code < 0 else f"ended with code {self.exit_code}"
        return "\n".join((f"{self.name} {how}; the last lines of its log:", *self.last_log_lines))


class Announcement(msgspec.Struct, frozen=True):
    """One line of a child's stdout: how far it has loaded, or that it is ready and where."""

    loading: float | None = None
    ready: bool = False
    address: str = ""
    http: str = ""
    grpc: str = ""
    metrics: str = ""


class ChildObserver(Protocol):
    """Told what children say."""

    def loading(self, name: str, fraction: float) -> None: ...

    def ready(self, name: str) -> None: ...

    def log(self, name: str, line: str) -> None: ...


class ChildProcess:
    """One child; made by `Children.start`, which also follows it."""

    def __init__(self, name: str, process: Process, observer: ChildObserver) -> None:
        self.name = name
        self._process = process
        self._observer = observer
        self._last_log_lines: deque[str] = deque(maxlen=_NUM_LAST_LOG_LINES)
        self._ready = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_until_ready(self) -> Announcement:
        """Never returns when the child dies before; `Children.first_death` does then."""
        ready: Announcement = await asyncio.shield(self._ready)
        return ready

    async def follow(self) -> ChildDeath:
        """Takes in all that the child says until it ends; how it ended."""
        async with asyncio.TaskGroup() as tasks:
            pipes = [tasks.create_task(self._read_announcements()), tasks.create_task(self._read_log())]
            exit_code = await self._process.wait()
            # A process that this child left behind may hold the pipes open.
            await asyncio.wait(pipes, timeout=_PIPES_END_S)
            for pipe in pipes:
                pipe.cancel()
        return ChildDeath(self.name, exit_code, tuple(self._last_log_lines))

    async def stop(self, timeout_s: float) -> None:
        """Asks the child to end, and kills it after the timeout."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _read_announcements(self) -> None:
        assert self._process.stdout is not None, "it was started with a pipe"
        async for line in self._process.stdout:
            try:
                said = msgspec.json.decode(line, type=Announcement)
            except msgspec.DecodeError:
                self._take_log_line(line)
                continue
            if said.loading is not None:
                self._observer.loading(self.name, said.loading)
            if said.ready and not self._ready.done():
                self._ready.set_result(said)
                self._observer.ready(self.name)

    async def _read_log(self) -> None:
        assert self._process.stderr is not None, "it was started with a pipe"
        async for line in self._process.stderr:
            self._take_log_line(line)

    def _take_log_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self._last_log_lines.append(text)
        self._observer.log(self.name, text)


class Children:
    """Children that come and go together: starts them, notices the first that dies, ends them all.

    Args:
        tasks: follows each child until its end.
        observer: told what they say.
    """

    def __init__(self, tasks: asyncio.TaskGroup, observer: ChildObserver) -> None:
        self._tasks = tasks
        self._observer = observer
        self._children: list[ChildProcess] = []
        self._first_death: asyncio.Future[ChildDeath] = asyncio.get_running_loop().create_future()

    async def start(self, command: ChildCommand) -> ChildProcess:
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent([sys.executable, "-m", command.module, *command.args]),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            limit=_MAX_LINE_BYTES,
            env=command.environ,
            start_new_session=True,
        )
        child = ChildProcess(command.name, process, self._observer)
        self._children.append(child)
        self._tasks.create_task(self._follow(child))
        return child

    async def first_death(self) -> ChildDeath:
        """Returns when a child has ended, and all it wrote has been read. To be asked while none of them should end."""
        return await asyncio.shield(self._first_death)

    async def stop(self, timeout_s: float) -> None:
        """Asks all to end, and kills those that have not after the timeout."""
        async with asyncio.TaskGroup() as stopping:
            for child in self._children:
                stopping.create_task(child.stop(timeout_s))

    def kill(self) -> None:
        """Ends all at once."""
        for child in self._children:
            child.kill()

    async def _follow(self, child: ChildProcess) -> None:
        death = await child.follow()
        if not self._first_death.done():
            self._first_death.set_result(death)
