"""Logs as one JSON object a line, times as engines write them; the message stays constant.

What is passed as `extra` becomes fields of the object; so does each of `extra={"fields": ...}`, whose names are free.
"""

import logging
from datetime import UTC, datetime
from typing import TextIO

import msgspec

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}
_LEFT_OUT = _STANDARD | {"color_message"}  # uvicorn's message once more, for terminals


class JsonFormatter(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        passed = {name: value for name, value in vars(record).items() if name not in _LEFT_OUT}
        line |= {**passed.pop("fields", {}), **passed, **line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def set_up_logging(level: str, stream: TextIO) -> None:
    """Sends everything at `level` or above to the stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    # What no line shows need not be found out for each: which line of code, thread and process wrote it.
    logging._srcfile = None  # as Python's own guide to logging says
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
