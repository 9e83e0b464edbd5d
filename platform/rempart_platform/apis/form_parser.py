"""Bytes of multipart/form-data to what they say, one part after the other; nothing is gathered but heads of parts."""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.errors import invalid_request

_UNLIMITED: Final = 1 << 40
"""The library's own limits on heads, which say in their errors nothing of ours."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part begins. Its `filename` is None when it is no file."""

    name: str
    filename: str | None


class Mark(Enum):
    PART_ENDS = auto()
    FORM_ENDS = auto()


FormEvent = Part | bytearray | Mark
"""Between a part's beginning and its end come the pieces of its content."""


class FormParser:
    """Push bytes in, take events out.

    Args:
        content_type: of the request.
        limits: of parts and their heads.

    Raises:
        RempartError: INVALID_REQUEST, here and by `push`.
    """

    def __init__(self, content_type: str, limits: HttpLimits) -> None:
        self.events: deque[FormEvent] = deque()
        self._limits = limits
        self._num_parts = 0
        self._num_head_bytes = 0
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        if len(content_type) > limits.max_part_head_bytes:  # what its parsing takes grows faster than it
            most = limits.max_part_head_bytes
            raise invalid_request(f"The header 'content-type' has more than {most} bytes (limit max_part_head_bytes).")
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise invalid_request("The header 'content-type' must be 'multipart/form-data'.")
        if not options.get(b"boundary"):
            raise invalid_request("The header 'content-type' names no boundary.")
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._take_header_name,
                    "on_header_value": self._take_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_head,
                    "on_part_data": self._take_content,
                    "on_part_end": lambda: self.events.append(Mark.PART_ENDS),
                    "on_end": lambda: self.events.append(Mark.FORM_ENDS),
                },
                max_header_count=_UNLIMITED,
                max_header_size=_UNLIMITED,
            )
        except FormParserError:
            raise invalid_request("The boundary in the header 'content-type' is too long.") from None

    def push(self, data: bytes) -> None:
        """What it says is in `events` then."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise invalid_request("The request's body is no valid multipart/form-data.") from None

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._limits.max_form_parts:
            raise invalid_request(f"The form has more than {self._limits.max_form_parts} parts (limit max_form_parts).")
        self._num_head_bytes = 0
        self._disposition = b""

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._count_head(len(b":\r\n"))
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_head(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise invalid_request("A part of the form has no name.")
        try:
            filename = options[b"filename"].decode() if b"filename" in options else None
            self.events.append(Part(options[b"name"].decode(), filename))
        except UnicodeDecodeError:
            raise invalid_request("The names in a form must be UTF-8.") from None

    def _take_content(self, data: bytes, start: int, end: int) -> None:
        if not self.events or not isinstance(self.events[-1], bytearray):
            self.events.append(bytearray())
        content = self.events[-1]
        assert isinstance(content, bytearray)
        content += data[start:end]

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        most = self._limits.max_part_head_bytes
        if self._num_head_bytes > most:
            raise invalid_request(f"A part's headers have more than {most} bytes (limit max_part_head_bytes).")
