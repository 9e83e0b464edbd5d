"""The bench's side of `contender.py`: one engine in a process of its own, frozen while it is not asked."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_SCRIPT = Path(__file__).with_name("contender.py")
_LOAD_TIMEOUT_S = 600.0
_ANSWER_TIMEOUT_S = 600.0


class ContenderError(Exception):
    """An engine does not load or does not answer; with the end of what it wrote."""


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """An engine to start."""

    name: str
    """As `contender.LOADERS` knows it."""
    python: str
    """Interpreter of the virtual environment that has the engine."""
    model: Path
    dtype: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request for tokens brought."""

    seconds: float
    """From the call to its return, inside of the engine's process."""
    token_ids: list[list[int]]


class Contender:
    """A loaded engine. Between two questions it is stopped, with its children, so that it cannot disturb the others."""

    def __init__(self, spec: ContenderSpec, process: "subprocess.Popen[str]", log: TextIO) -> None:
        self.name = spec.name
        self._process = process
        self._log = log
        ready = self._read(_LOAD_TIMEOUT_S)
        self.version = str(ready["version"])
        self.dtype = str(ready["dtype"])
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> Answer:
        """Greedy output of all prompts together, exactly `max_tokens` each.

        Raises:
            ContenderError: the engine died, hangs, or gave another number of tokens.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        reply = self._read(_ANSWER_TIMEOUT_S)
        self._signal(signal.SIGSTOP)
        answer = Answer(reply["seconds"], reply["token_ids"])
        lengths = [len(token_ids) for token_ids in answer.token_ids]
        if lengths != [max_tokens] * len(prompts):
            raise ContenderError(f"{self.name} gave {lengths} tokens for {len(prompts)} prompts of {max_tokens} each")
        return answer

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None, "opened as a pipe"
        watchdog = threading.Timer(timeout_s, self._signal, (signal.SIGKILL,))
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            self._log.seek(0)
            raise ContenderError(f"{self.name} ended or was silent for {timeout_s} s:\n{self._log.read()[-3000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


@contextmanager
def running(spec: ContenderSpec, *, num_threads: int, max_model_len: int) -> Iterator[Contender]:
    """Starts an engine, waits until it has loaded its model, and at the end kills it with its children.

    Raises:
        ContenderError: it does not load.
    """
    command = [spec.python, "-P", str(_SCRIPT), spec.name, "--model", str(spec.model), "--dtype", spec.dtype]
    command += ["--threads", str(num_threads), "--max-model-len", str(max_model_len)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(os.environ),
            start_new_session=True,  # one group of processes: what an engine starts is stopped and killed with it
        )
        with process:
            try:
                yield Contender(spec, process, log)
            finally:
                os.killpg(process.pid, signal.SIGKILL)


def measure_limits(num_threads: int) -> dict[str, float]:
    """What `limits.py` finds, in a process of its own."""
    script = Path(__file__).with_name("limits.py")
    command = [sys.executable, "-P", str(script), "--threads", str(num_threads)]
    environment = _environment(os.environ)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(output)
    return found


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without settings of thread numbers, which would bind some engines and not others: all take all cores."""
    return {name: value for name, value in environ.items() if not name.endswith("_NUM_THREADS")}
