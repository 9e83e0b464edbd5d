"""Bytes of a request body to its schema, with an answer for every field that a client may send.

A field is understood (openai_schema.py), harmless, or refused; nothing that would change the output is dropped.
"""

import re
from functools import cache
from typing import Final, TypeVar

import msgspec

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.json_guard import check_json_shape

_HARMLESS: Final = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "spaces_between_special_tokens",
        "store",
    }
)
"""Accepted and without effect: labels, storage, and hints about speed."""

_REFUSED: Final[dict[str, tuple[object, ...]]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Would change the output in a way that is not offered; null and the listed values change nothing and pass."""

_MAX_HARMLESS_BYTES: Final = 64
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`\[.]*)[^`]*`$")
_MISSING = re.compile(r"missing required field `(\w+)`")

_Body = TypeVar("_Body", bound=msgspec.Struct)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


@cache
def _field_names(kind: type[msgspec.Struct]) -> frozenset[str]:
    """Reflection is too slow for every request."""
    return frozenset(field.name for field in msgspec.structs.fields(kind))


def decode_body(data: bytes, kind: type[_Body], limits: HttpLimits) -> _Body:
    """Raises RempartError INVALID_REQUEST that names the field at fault."""
    check_json_shape(data, max_nodes=limits.max_json_nodes, max_depth=limits.max_json_depth)
    try:
        known = _field_names(kind)
        for name, value in _fields_decoder.decode(data).items():
            if name not in known:
                _check_unknown(name, bytes(value))
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RempartError(ErrorKind.INVALID_REQUEST, "The request's body is not valid JSON.") from None


def _check_unknown(name: str, value: bytes) -> None:
    if name in _HARMLESS:
        return
    shown = name[:64]
    if name not in _REFUSED:
        message = f"Unrecognized request argument supplied: {shown}"
        raise RempartError(ErrorKind.INVALID_REQUEST, message, param=shown)
    is_small = len(value) <= _MAX_HARMLESS_BYTES
    if not is_small or msgspec.json.decode(value) not in (None, *_REFUSED[name]):
        raise RempartError(ErrorKind.INVALID_REQUEST, f"'{shown}' is not supported here.", param=shown)


def _explain(error: msgspec.ValidationError) -> RempartError:
    """msgspec tells what was expected and the type of what came, nothing of the client's own text."""
    message = str(error)
    found = _PATH.search(message) or _MISSING.search(message)
    param = (found.group(1) or None) if found else None
    return RempartError(ErrorKind.INVALID_REQUEST, f"Invalid body: {message}.", param=param)
