"""The form of an upload, read as it comes: fields, the file in pieces, fields.

bytes of the body ─► FormParser ─► find_file: fields ─► content: the file ─► fields that follow it
"""

from collections.abc import AsyncIterator

from rempart_platform.apis.form_parser import FormEvent, FormParser, Mark, Part
from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.errors import invalid_request

_FILE = "file"


class UploadForm:
    """One form with one file in it, which must be named "file".

    Args:
        pieces: the request's body.
        content_type: and its header.
        limits: of the form.
        field_names: other fields than these are refused.

    Raises:
        RempartError: INVALID_REQUEST, here and while it is read; whatever `pieces` raise.
    """

    def __init__(
        self, pieces: AsyncIterator[bytes], content_type: str, limits: HttpLimits, field_names: frozenset[str]
    ) -> None:
        self.fields: dict[str, str] = {}
        """Those that have come."""
        self._pieces = pieces
        self._parser = FormParser(content_type, limits)
        self._max_field_bytes = limits.max_field_bytes
        self._field_names = field_names
        self._num_files = 0

    async def find_file(self) -> str:
        """Reads the fields before the file; its name."""
        filename = await self._read_fields()
        if filename is None:
            raise invalid_request("The form has no 'file'.", _FILE)
        return filename

    async def content(self) -> AsyncIterator[bytes]:
        """The file, to be read after it was found. With its last piece come all fields that follow it."""
        while (event := await self._next()) is not Mark.PART_ENDS:
            assert isinstance(event, bytearray)
            yield bytes(event)
        await self._read_fields()

    async def _read_fields(self) -> str | None:
        """Up to the next file, whose name it gives, or to the form's end."""
        while (part := await self._next()) is not Mark.FORM_ENDS:
            assert isinstance(part, Part)
            if part.name == _FILE:
                return self._take_file(part)
            self.fields[self._new_field(part.name)] = await self._read_value(part.name)
        return None

    def _take_file(self, part: Part) -> str:
        self._num_files += 1
        if self._num_files > 1:
            raise invalid_request("The form has more than one 'file'.", _FILE)
        if part.filename is None:
            raise invalid_request("The form's 'file' has no filename.", _FILE)
        return part.filename

    def _new_field(self, name: str) -> str:
        shown = name[:64]
        if name not in self._field_names:
            raise invalid_request(f"Unrecognized request argument supplied: {shown}", shown)
        if name in self.fields:
            raise invalid_request(f"'{name}' is given twice.", name)
        return name

    async def _read_value(self, name: str) -> str:
        value = bytearray()
        while (event := await self._next()) is not Mark.PART_ENDS:
            assert isinstance(event, bytearray)
            value += event
            if len(value) > self._max_field_bytes:
                message = f"'{name}' has more than {self._max_field_bytes} bytes (limit max_field_bytes)."
                raise invalid_request(message, name)
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise invalid_request(f"'{name}' is not UTF-8.", name) from None

    async def _next(self) -> FormEvent:
        events = self._parser.events
        while not events:
            piece = await anext(self._pieces, None)
            if piece is None:
                raise invalid_request("The form ends early.")
            self._parser.push(piece)
        return events.popleft()
