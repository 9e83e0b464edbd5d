"""What tenants may ask of files and batches: one set of rules for HTTP and gRPC."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from rempart_platform.apis.services import ApiServices
from rempart_platform.batch.values import Batches, BatchLimits, Files, StoredFile
from rempart_platform.errors import ErrorKind, RempartError, invalid_request

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions")
PURPOSE: Final = "batch"
DEFAULT_WINDOW: Final = "24h"
MAX_FILENAME_CHARS: Final = 255
MIN_LIFETIME_S: Final = 3600
MAX_FILES_PER_PAGE: Final = 10_000
"""Also when a caller names no number; as OpenAI has it, like the numbers above and below."""
MAX_BATCHES_PER_PAGE: Final = 100
BATCHES_PER_PAGE: Final = 20
MAX_METADATA_PAIRS: Final = 16
MAX_METADATA_KEY_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512

_HOUR_S = 3600
_MAX_SHOWN_CHARS = 64
_WINDOW = re.compile(r"([1-9][0-9]{0,5})h", re.ASCII)
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
_CONTROLS = frozenset({"Cc", "Zl", "Zp"})
"""Categories of Unicode: what ends a line or moves a cursor."""
_T = TypeVar("_T")


def files_of(services: ApiServices) -> Files:
    """Raises RempartError NOT_FOUND when batch jobs are off."""
    return _require(services.files)


def batches_of(services: ApiServices) -> Batches:
    """Raises RempartError NOT_FOUND when batch jobs are off."""
    return _require(services.batches)


def check_file_id(file_id: str) -> str:
    """Raises RempartError NOT_FOUND for what is no id at all."""
    if not _FILE_ID.fullmatch(file_id):
        raise RempartError(ErrorKind.NOT_FOUND, f"There is no file '{file_id[:_MAX_SHOWN_CHARS]}'.")
    return file_id


def check_batch_id(batch_id: str) -> str:
    """Raises RempartError NOT_FOUND for what is no id at all."""
    if not _BATCH_ID.fullmatch(batch_id):
        raise RempartError(ErrorKind.NOT_FOUND, f"There is no batch '{batch_id[:_MAX_SHOWN_CHARS]}'.")
    return batch_id


def check_filename(filename: str, *, param: str) -> str:
    """Raises RempartError INVALID_REQUEST."""
    if not 1 <= len(filename) <= MAX_FILENAME_CHARS:
        raise invalid_request(f"A file's name must have 1 to {MAX_FILENAME_CHARS} characters.", param)
    if any(unicodedata.category(each) in _CONTROLS for each in filename):
        raise invalid_request("A file's name must not have control characters.", param)
    return filename


def check_purpose(purpose: str | None) -> str:
    """Raises RempartError INVALID_REQUEST."""
    if purpose != PURPOSE:
        raise invalid_request(f"'purpose' must be '{PURPOSE}': files are for batch jobs here.", "purpose")
    return purpose


def check_lifetime_s(seconds: int, limits: BatchLimits, *, param: str) -> int:
    """Raises RempartError INVALID_REQUEST."""
    most = limits.max_file_lifetime_s
    if not MIN_LIFETIME_S <= seconds <= most:
        message = f"'{param}' must be between {MIN_LIFETIME_S} and {most} seconds (limit max_file_lifetime_s)."
        raise invalid_request(message, param)
    return seconds


def check_endpoint(endpoint: str) -> str:
    """Raises RempartError INVALID_REQUEST."""
    if endpoint not in ENDPOINTS:
        raise invalid_request(f"'endpoint' must be one of {', '.join(ENDPOINTS)}.", "endpoint")
    return endpoint


def parse_window_s(window: str, limits: BatchLimits) -> int:
    """Seconds of "24h" and its like. Raises RempartError INVALID_REQUEST."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found.group(1)) * _HOUR_S if found else 0
    if not 0 < seconds <= limits.max_completion_window_s:
        longest = window_text(limits.max_completion_window_s)
        message = f"'completion_window' must be hours, from '1h' to '{longest}' (limit max_completion_window_s)."
        raise invalid_request(message, "completion_window")
    return seconds


def window_text(seconds: int) -> str:
    """What `parse_window_s` understands."""
    return f"{seconds // _HOUR_S}h"


def check_metadata(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Raises RempartError INVALID_REQUEST."""
    if len(metadata) > MAX_METADATA_PAIRS:
        raise invalid_request(
            f"'metadata' has {len(metadata)} pairs; at most {MAX_METADATA_PAIRS} are allowed.", "metadata"
        )
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY_CHARS:
            raise invalid_request(f"Keys of 'metadata' must have 1 to {MAX_METADATA_KEY_CHARS} characters.", "metadata")
        if len(value) > MAX_METADATA_VALUE_CHARS:
            raise invalid_request(
                f"Values of 'metadata' must have at most {MAX_METADATA_VALUE_CHARS} characters.", "metadata"
            )
    return metadata


def check_files_per_page(limit: int | None) -> int:
    """Raises RempartError INVALID_REQUEST."""
    return MAX_FILES_PER_PAGE if limit is None else _check_page_size(limit, MAX_FILES_PER_PAGE)


def check_batches_per_page(limit: int | None) -> int:
    """Raises RempartError INVALID_REQUEST."""
    return BATCHES_PER_PAGE if limit is None else _check_page_size(limit, MAX_BATCHES_PER_PAGE)


def _check_page_size(limit: int, most: int) -> int:
    if not 1 <= limit <= most:
        raise invalid_request(f"'limit' must be between 1 and {most}.", "limit")
    return limit


def page_of(files: Sequence[StoredFile], *, after: str, size: int) -> tuple[Sequence[StoredFile], bool]:
    """`size` files behind the one with the id `after`, and whether there are more.

    Raises:
        RempartError: INVALID_REQUEST when no file has that id.
    """
    start = 0
    if after:
        ids = [each.file_id for each in files]
        if after not in ids:
            raise invalid_request("'after' is the id of nothing in this list.", "after")
        start = ids.index(after) + 1
    return files[start : start + size], start + size < len(files)


def _require(part: _T | None) -> _T:
    if part is None:
        raise RempartError(
            ErrorKind.NOT_FOUND, "There are no batch jobs here: the operator has not configured batch storage."
        )
    return part
