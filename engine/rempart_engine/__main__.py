"""Start an engine: `python -m rempart_engine --model PATH`.

Says on stdout, one JSON object a line: {"loading": 0.42} while loading, then once
{"ready": true, "address": "127.0.0.1:50051", "metrics": "http://127.0.0.1:50052/metrics"}.
"""

import asyncio
import json
import logging
import os
import sys

from rempart_engine.config import EngineConfig
from rempart_engine.logs import set_up_logging
from rempart_engine.serving import ExitCode, serve


def _announce(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    config = EngineConfig.from_args(sys.argv[1:])
    set_up_logging(config.log_level)
    try:
        return asyncio.run(serve(config, os.environ, _announce))
    except OSError as error:
        logging.getLogger(__name__).error(str(error))
        return ExitCode.LOAD_FAILED


if __name__ == "__main__":
    sys.exit(main())
