"""`rempart up` at the console: signals in; progress, the welcome and the exit code out."""

import asyncio
import signal
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import partial

import grpc.aio
from rich.console import Console

from rempart_platform.console.rpc_failure import describe
from rempart_platform.local.config import HOST, VERIFY, LocalConfig, LocalConfigError
from rempart_platform.local.run import LocalPlatform, RunningPlatform, StopRequests
from rempart_platform.local.startup_view import StartupView
from rempart_platform.local.welcome import ready_line, welcome
from rempart_platform.tenancy.embedded import EmbeddedRedisError


class ExitCode(IntEnum):
    """What the end of `rempart up` means."""

    DRAINED = 0
    FAILED = 1
    BAD_SETTING = 2
    CUT_SHORT = 130


def up(config: LocalConfig, environ: Mapping[str, str], program: str, *, as_json: bool) -> ExitCode:
    """Runs until Ctrl-C or SIGTERM, or until something dies.

    Args:
        program: how the person's shell calls `rempart`.
        as_json: says where everything is in one line of JSON instead of a welcome.
    """
    console = Console(stderr=True)
    try:
        with StartupView(console) as view:
            return asyncio.run(_up(config, environ, view, ready_line if as_json else partial(welcome, program=program)))
    except LocalConfigError as error:
        return _failed(console, str(error), ExitCode.BAD_SETTING)
    except grpc.aio.AioRpcError as error:
        return _failed(console, describe(error, HOST), ExitCode.FAILED)
    except (EmbeddedRedisError, OSError) as error:
        return _failed(console, str(error), ExitCode.FAILED)


async def _up(
    config: LocalConfig, environ: Mapping[str, str], view: StartupView, render: Callable[[RunningPlatform], str]
) -> ExitCode:
    stop = StopRequests()

    def on_signal() -> None:
        stop.ask()
        if not stop.at_once.is_set():
            view.say("Draining: running answers may end. Once more ends them at once.")

    for number in _stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, on_signal)

    def announce(platform: RunningPlatform) -> None:
        view.all_ready()
        sys.stdout.write(render(platform) + "\n")
        sys.stdout.flush()

    view.expect(
        *(() if config.require_manifest is None else (VERIFY,)),
        *(f"engine {number}" for number in range(1, config.num_engines + 1)),
    )
    death = await LocalPlatform(config, environ, view).run(announce, stop)
    if death is not None:
        view.say(death)
        return ExitCode.FAILED
    return ExitCode.CUT_SHORT if stop.at_once.is_set() else ExitCode.DRAINED


def _stop_signals() -> list[signal.Signals]:
    """A closed terminal ends it too, unless it was started to outlive that (nohup)."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def _failed(console: Console, message: str, code: ExitCode) -> ExitCode:
    console.print(f"rempart up: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code
