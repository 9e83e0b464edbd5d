"""What the front ends and the workers of batch jobs agree on."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from rempart_platform.bounds import require_positive
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller

MAX_PIECE_BYTES: Final = 256 * 1024
"""Of a content on its way out: a slow reader may leave one lying."""


class BatchStatus(Enum):
    """OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a tenant. Times are seconds since the epoch."""

    file_id: str
    """file-<32 hex digits>."""
    tenant: str
    filename: str
    purpose: str
    """"batch" of an input, "batch_output" of a result."""
    num_bytes: int
    created_s: int
    expires_s: int = 0
    """0 for never."""


@dataclass(frozen=True, slots=True)
class InputError:
    """Why a batch's input was refused."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1; None when it is no line's fault."""


@dataclass(frozen=True, slots=True)
class LineCounts:
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    """Answered with success."""
    failed: int = 0
    """Answered with an error, those that expired or were cancelled among them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch job of a tenant. Times are seconds since the epoch; None means that it did not come to that."""

    batch_id: str
    """batch_<32 hex digits>."""
    caller: Caller
    endpoint: str
    """"/v1/chat/completions" or "/v1/completions"."""
    input_file_id: str
    completion_window_s: int
    status: BatchStatus
    created_s: int
    expires_s: int
    model: str = ""
    """The one that all lines name; "" until validated."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[InputError, ...] = ()
    counts: LineCounts = LineCounts()
    output_lifetime_s: int | None = None
    """Of its result files; None as the operator has configured it."""
    output_file_id: str = ""
    """"" while there is none."""
    error_file_id: str = ""
    in_progress_s: int | None = None
    finalizing_s: int | None = None
    completed_s: int | None = None
    failed_s: int | None = None
    expired_s: int | None = None
    cancelling_s: int | None = None
    cancelled_s: int | None = None


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What tenants may ask of batch jobs."""

    max_file_bytes: int = 200 * 1024 * 1024
    """Of one file."""
    max_lines: int = 50_000
    """Of one batch."""
    max_line_bytes: int = 1024 * 1024
    """Of one line of a batch."""
    max_files_per_tenant: int = 1000
    """That are kept at a time."""
    max_transfers_per_tenant: int = 16
    """Uploads and downloads under way at a time, of one router: each holds up to some 10 MiB of its memory."""
    max_open_batches_per_tenant: int = 50
    """That have not ended."""
    max_batches_per_tenant: int = 2000
    """That are remembered. The oldest that has ended makes room, once the results of its shards are gone."""
    file_lifetime_s: int = 30 * 24 * 3600
    """For how long files are kept that name no expiry of their own; 0 for ever."""
    max_file_lifetime_s: int = 30 * 24 * 3600
    """That files may name."""
    max_completion_window_s: int = 7 * 24 * 3600
    """That a batch may name."""
    max_custom_id_chars: int = 512
    """Characters of the name of a line."""
    max_input_errors: int = 100
    """That a refused batch names; checking ends there."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("file_lifetime_s",))

    def expiry_s(self, created_s: int, asked_s: int | None) -> int:
        """When a file expires, 0 for never, of which this lifetime was asked for: 0 is for ever, None says nothing."""
        lifetime_s = self.file_lifetime_s if asked_s is None else asked_s
        return created_s + lifetime_s if lifetime_s else 0


def file_too_large(limits: BatchLimits) -> RempartError:
    message = f"The file is too large; at most {limits.max_file_bytes} bytes are allowed (limit max_file_bytes)."
    return RempartError(ErrorKind.REQUEST_TOO_LARGE, message, param="file")


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What an online request with a line's body would have been answered."""

    status_code: int
    request_id: str
    body: bytes
    """JSON."""
    error: RempartError | None = None
    """None for success."""


class LineRunner(Protocol):
    """Runs single lines as online requests are run, at the batch tier."""

    async def __call__(self, caller: Caller, endpoint: str, body: bytes, timeout_s: float) -> LineAnswer:
        """Never raises for what a client could be told. Cancelling it ends the request."""
        ...


class Files(Protocol):
    """Files of tenants. No tenant sees another's: those are NOT_FOUND.

    Raises:
        RempartError: NOT_FOUND, INVALID_REQUEST; REQUEST_TOO_LARGE and RATE_LIMIT_EXCEEDED, which name the limit;
            UNAVAILABLE when Redis or the object storage does not answer.
    """

    async def create(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        content: AsyncIterator[bytes],
        *,
        lifetime_s: Callable[[], int | None] = lambda: None,
    ) -> StoredFile:
        """Takes the content as it comes, in little memory. Nothing is kept when it fails or is cancelled.

        Args:
            lifetime_s: asked when the content is whole, for some clients say it last. 0 is for ever, None as the
                operator has configured it.
        """
        ...

    async def get(self, tenant: str, file_id: str) -> StoredFile: ...

    async def list(self, tenant: str, *, purpose: str = "") -> Sequence[StoredFile]:
        """Newest first."""
        ...

    async def delete(self, tenant: str, file_id: str) -> None:
        """INVALID_REQUEST while a batch that is not final reads it."""
        ...

    def read(self, file: StoredFile) -> AsyncGenerator[bytes, None]:
        """Its content, in pieces of up to `MAX_PIECE_BYTES`, none empty. To be closed by who does not read it all."""
        ...


class Batches(Protocol):
    """Batch jobs of tenants. Errors as of `Files`."""

    async def create(
        self,
        caller: Caller,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window_s: int,
        metadata: Mapping[str, str],
        output_lifetime_s: int | None = None,
    ) -> Batch:
        """Returns at once with status VALIDATING; what is wrong with the lines is said by the batch later."""
        ...

    async def get(self, tenant: str, batch_id: str) -> Batch: ...

    async def list(self, tenant: str, *, limit: int, after: str = "") -> tuple[Sequence[Batch], bool]:
        """So many, newest first, and whether there are more. `after` is the id of the batch before the first one.

        Raises:
            RempartError: INVALID_REQUEST when the tenant has no batch with that id.
        """
        ...

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """CANCELLING; a batch that is final already is INVALID_REQUEST."""
        ...
