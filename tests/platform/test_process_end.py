"""Processes end with their own exit code, and do not take Python down while libraries still have threads in it."""

import os
import subprocess
import sys

import pytest

DOOMED = "import atexit, os, runpy, sys; atexit.register(os.abort); "
"""A process that aborts when Python is taken down."""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", DOOMED + code]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, check=False)


def test_what_was_said_is_written() -> None:
    code = "from rempart_platform.process_end import end_process; print('said', end=''); end_process(3)"
    ended = run(code)
    assert (ended.returncode, ended.stdout) == (3, "said")


@pytest.mark.parametrize(
    ("module", "args", "code"),
    [
        ("rempart_platform.cli", ["plan", "--help"], 0),
        ("rempart_platform.cli", ["no-such-command"], 2),
        ("rempart_platform", ["--engines", "127.0.0.1:1", "--model", "m=/nowhere"], 2),
    ],
)
def test_commands_and_routers_end_so(module: str, args: list[str], code: int) -> None:
    ended = run(f"sys.argv = {['program', *args]!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")
    assert ended.returncode == code, ended.stderr
    assert ended.stdout or ended.stderr
