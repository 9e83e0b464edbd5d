"""JSON that tenants and models write inside of texts: read strictly, written as the models' training data has it."""

import json
import re
from itertools import accumulate
from typing import NoReturn

_MAX_DEPTH = 100
"""Parsing and writing recurse with the nesting."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKET = re.compile(r"[^\[\]{}]+")


def read_json(text: str) -> object:
    """The value. Raises ValueError for anything else than one JSON value, also for one nesting over 100 levels."""
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
        raise ValueError(f"the JSON nests deeper than {_MAX_DEPTH} levels")
    return json.loads(text, parse_constant=_refuse)


def read_object(text: str) -> dict[str, object]:
    """The members of a JSON object; of a blank text, none. Raises ValueError for anything else."""
    value = read_json(text) if text.strip() else {}
    if not isinstance(value, dict):
        raise ValueError("the JSON is not an object")
    return value


def write_json(value: object) -> str:
    """`value` with a space after commas and colons, its characters as themselves; escaped when they are no Unicode."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_unicode(text) else json.dumps(value)


def escape(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string."""
    return write_json(text)[1:-1]


def _depth(text: str) -> int:
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
