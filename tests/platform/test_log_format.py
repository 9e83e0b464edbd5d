import io
import json
import logging
import re

import pytest

from rempart_platform.log_format import JsonFormatter


@pytest.fixture
def logger() -> logging.Logger:
    return logging.Logger("a.name")


def _line(logger: logging.Logger, message: str, **extra: object) -> dict[str, object]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.warning(message, extra=extra)
    (line,) = stream.getvalue().splitlines()
    parsed: dict[str, object] = json.loads(line)
    return parsed


def test_what_is_passed_becomes_fields_of_one_line(logger: logging.Logger) -> None:
    line = _line(logger, "it\nhappened", reason="a\nb", number=3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line.pop("time")))
    assert line == {"level": "warning", "logger": "a.name", "message": "it\nhappened", "reason": "a\nb", "number": 3}


def test_fields_whose_names_are_free_stand_beside_the_others(logger: logging.Logger) -> None:
    line = _line(logger, "it happened", fields={"name": "gold", "message": "another"}, reason="r")
    assert (line["name"], line["message"], line["reason"]) == ("gold", "it happened", "r")
    assert "fields" not in line


def test_colours_for_terminals_are_left_out(logger: logging.Logger) -> None:
    assert "color_message" not in _line(logger, "Started", color_message="\x1b[36mStarted\x1b[0m")
