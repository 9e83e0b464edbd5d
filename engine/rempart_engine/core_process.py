"""Main of the engine core's process: `python -m rempart_engine.core_process FD PARENT_PID`.

Loads the model, then runs the loop. Speaks only to the front, over the socket FD, and dies with it. Exits with 0 when
the front said stop, 2 when the model cannot be loaded, and 1 for any other reason.
"""

import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

from rempart_engine.config import BLOCK_SIZE, EngineConfig
from rempart_engine.core.runner import LoadedModel
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.scheduler_config import SchedulerConfig
from rempart_engine.engine import EngineLoop
from rempart_engine.ipc import Configure, CoreChannel, FrontGoneError, LoadFailed, Loading, Ready
from rempart_engine.logs import set_up_logging
from rempart_engine.manifest import verify_manifest

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_LOAD_FAILED = 2

_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def main(fd: int, parent_pid: int) -> int:
    """Run the core on the socket `fd`; the exit code."""
    _die_with(parent_pid)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the front decides
        signal.signal(ignored, signal.SIG_IGN)
    channel = CoreChannel(socket.socket(fileno=fd))
    try:
        return _run(channel)
    except FrontGoneError:
        _log.error("engine front is gone, engine core exits")
    except Exception:
        _log.critical("engine core failed", exc_info=True)
    return EXIT_FAILED


def _run(channel: CoreChannel) -> int:
    (configure,) = channel.receive(timeout_s=None)
    assert isinstance(configure, Configure), "the front configures the core first"
    config = configure.config
    set_up_logging(config.log_level)
    try:
        loaded = _load(config, lambda fraction: channel.send(Loading(fraction)))
        scheduler = Scheduler(scheduler_config(config, loaded))
    except FrontGoneError:
        raise
    except Exception as error:
        _log.debug("loading failed", exc_info=True)
        channel.send(LoadFailed(f"{type(error).__name__}: {error}"))
        return EXIT_LOAD_FAILED
    heartbeat_s = min(1.0, config.step_timeout_s / 4)
    loop = EngineLoop(scheduler, loaded.runner, channel, heartbeat_s)
    loop.sign_of_life()  # before the front is ready, so that a ready front knows its load
    channel.send(
        Ready(
            model_name=loaded.model_name,
            architecture=loaded.architecture,
            vocab_size=loaded.vocab_size,
            max_model_len=loaded.max_model_len,
            eos_token_ids=loaded.eos_token_ids,
            num_blocks=loaded.num_blocks,
            dtype=loaded.dtype,
            max_num_rows=config.max_num_rows,
        )
    )
    loop.run()
    return EXIT_STOPPED


def _load(config: EngineConfig, on_progress: Callable[[float], None]) -> LoadedModel:
    if config.require_manifest is not None:
        num_files = verify_manifest(config.model, config.require_manifest, config.manifest_key)
        _log.info("model is as its manifest says", extra={"num_files": num_files})
    module, _, name = config.runner.partition(":")
    load = getattr(importlib.import_module(module), name)
    loaded = load(config, on_progress)
    if not isinstance(loaded, LoadedModel):
        raise TypeError(f"{config.runner} must return a LoadedModel, got {type(loaded).__name__}")
    return loaded


def scheduler_config(config: EngineConfig, loaded: LoadedModel) -> SchedulerConfig:
    """What the scheduler must know, from what was asked for and what was loaded.

    Raises:
        ValueError: drafts are asked of a model that cannot make any.
    """
    return SchedulerConfig(
        num_blocks=loaded.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_rows=config.max_num_rows,
        max_step_tokens=config.max_step_tokens,
        max_model_len=loaded.max_model_len,
        watermark=config.watermark,
        enable_prefix_cache=config.enable_prefix_cache,
        max_num_waiting=config.max_num_waiting,
        num_speculative_tokens=config.num_drafts_with(loaded.num_mtp_layers),
        max_speculative_rows=config.max_speculative_rows,
        eos_token_ids=loaded.eos_token_ids,
        vocab_size=loaded.vocab_size,
    )


def _die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent dies, whatever it does then.

    Outside Linux the end of the socket must do, which is noticed between steps.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died before the call
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
