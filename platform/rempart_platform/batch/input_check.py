"""Whether the lines of an input can be done, and how they are cut.

A line may still fail on its own when its turn comes; what is checked here would fail the whole.
"""

from collections.abc import AsyncIterator, Callable

import msgspec

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.input_lines import InputLine, LineTooLongError, RequestBody, RequestLine, read_lines
from rempart_platform.batch.plan import Cutter, Plan
from rempart_platform.batch.values import BatchLimits, InputError
from rempart_platform.errors import RempartError
from rempart_platform.json_guard import check_json_shape

_MAX_NODES, _MAX_DEPTH = 1_000_000, 128
_MAX_SHOWN = 100  # characters of a name that a line brings: errors are kept in Redis

_line_decoder = msgspec.json.Decoder(RequestLine)
_body_decoder = msgspec.json.Decoder(RequestBody)


class BadInputError(Exception):
    """The input is refused."""

    def __init__(self, errors: tuple[InputError, ...]) -> None:
        super().__init__(errors)
        self.errors = errors


async def check_input(
    pieces: AsyncIterator[bytes], endpoint: str, config: BatchConfig, is_model: Callable[[str], bool]
) -> Plan:
    """Reads all of an input.

    Args:
        pieces: its content.
        endpoint: the `url` that each line must name.
        is_model: whether a model is served here.

    Raises:
        BadInputError: with the first `max_input_errors` of what is wrong.
    """
    check = _Check(endpoint, config.limits, is_model)
    cutter = Cutter(config.lines_per_shard, config.max_shard_bytes)
    num_lines = 0
    try:
        async for line in read_lines(pieces, config.limits.max_line_bytes):
            num_lines += 1
            if num_lines > config.limits.max_lines:
                message = f"The input holds more than {config.limits.max_lines} lines (limit max_lines)."
                check.refuse(InputError("too_many_lines", message))
                break
            check.take(line)
            cutter.add(line)
            if check.is_full:
                break
    except LineTooLongError as error:
        message = f"The line is longer than {config.limits.max_line_bytes} bytes (limit max_line_bytes)."
        check.refuse(InputError("line_too_long", message, line=error.number))
    if num_lines == 0 and not check.errors:
        check.refuse(InputError("empty_file", "The input holds no line."))
    if check.errors:
        raise BadInputError(tuple(check.errors))
    return Plan(check.model, cutter.shards())


class _Check:
    """What must hold of each line and of all together."""

    def __init__(self, endpoint: str, limits: BatchLimits, is_model: Callable[[str], bool]) -> None:
        self.model = ""
        self.errors: list[InputError] = []
        self._endpoint = endpoint
        self._limits = limits
        self._is_model = is_model
        self._lines_of: dict[str, int] = {}

    @property
    def is_full(self) -> bool:
        return len(self.errors) >= self._limits.max_input_errors

    def refuse(self, error: InputError) -> None:
        self.errors.append(error)

    def take(self, line: InputLine) -> None:
        error = self._error_of(line)
        if error is not None:
            self.refuse(error)

    def _error_of(self, line: InputLine) -> InputError | None:
        try:
            check_json_shape(line.data, max_nodes=_MAX_NODES, max_depth=_MAX_DEPTH)
            request = _line_decoder.decode(line.data)
        except RempartError as error:
            return InputError("invalid_json_line", error.message, line=line.number)
        except msgspec.ValidationError as error:
            return InputError("invalid_request", f"The line is no request: {error}.", line=line.number)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return InputError("invalid_json_line", f"The line is no JSON: {error}.", line=line.number)
        return self._error_of_request(request, line.number) or self._error_of_body(request, line.number)

    def _error_of_request(self, request: RequestLine, number: int) -> InputError | None:
        custom_id, limit = request.custom_id, self._limits.max_custom_id_chars
        if not 0 < len(custom_id) <= limit:
            message = f"'custom_id' must have 1 to {limit} characters (limit max_custom_id_chars)."
            return InputError("invalid_custom_id", message, "custom_id", number)
        first = self._lines_of.setdefault(custom_id, number)
        if first != number:
            message = f"Line {first} has the custom_id {custom_id!r} already."
            return InputError("duplicate_custom_id", message, "custom_id", number)
        if request.method != "POST":
            return InputError("invalid_method", "'method' must be POST.", "method", number)
        if request.url != self._endpoint:
            return InputError("mismatched_url", f"'url' must be the batch's endpoint {self._endpoint}.", "url", number)
        return None

    def _error_of_body(self, request: RequestLine, number: int) -> InputError | None:
        try:
            model = _body_decoder.decode(request.body).model
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return InputError("invalid_body", f"'body' must be an object that names a model: {error}.", "body", number)
        if not self._is_model(model):
            return InputError(
                "model_not_found", f"The model {model[:_MAX_SHOWN]!r} does not exist.", "body.model", number
            )
        self.model = self.model or model
        if model != self.model:
            message = f"All lines must name one model; the first names {self.model!r}."
            return InputError("mismatched_model", message, "body.model", number)
        return None
