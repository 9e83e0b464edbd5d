"""Start a router: `python -m rempart_platform --model NAME=PATH --engines HOST:PORT`.

Says on stdout, once it can serve, one JSON line:
{"ready": true, "http": "http://127.0.0.1:8000", "grpc": "127.0.0.1:8001", "metrics": "http://127.0.0.1:8002/metrics"}.
SIGTERM or SIGINT drains. Secrets come from the environment, see `config.py`.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

import uvloop

from rempart_platform.config import ConfigError, RouterConfig, RouterSecrets
from rempart_platform.log_format import set_up_logging
from rempart_platform.process_end import end_process
from rempart_platform.router import serve

_logger = logging.getLogger(__name__)

_OBJECTS_PER_COLLECTION = 10_000


def _announce(line: dict[str, object]) -> None:
    _keep_collections_short()
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _keep_collections_short() -> None:
    """What is loaded by now stays: a vocabulary is a million objects, which no collection needs to look at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_PER_COLLECTION)


async def _serve_until_signal(config: RouterConfig, secrets: RouterSecrets) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(config, secrets, _announce, stop)


def main(args: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a router; returns the process's exit code."""
    config = RouterConfig.from_args(args)
    set_up_logging(config.log_level, sys.stderr)
    try:
        secrets = RouterSecrets.from_environ(environ)
    except ConfigError as error:
        _logger.error(str(error))
        return 2
    exit_code = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_until_signal(config, secrets))
    except* (OSError, RuntimeError, ValueError) as errors:
        _logger.exception("the router cannot go on", extra={"reason": "; ".join(_reasons(errors))})
        exit_code = 1
    return exit_code


def _reasons(error: BaseException) -> Iterator[str]:
    """What the errors of a group say, for whoever looks for no traceback."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _reasons(each)
    else:
        yield str(error) or type(error).__name__


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own log lines are no JSON
    end_process(main(sys.argv[1:], os.environ))
