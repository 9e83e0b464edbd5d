"""`rempart batch run`: one file through a batch job, from upload to results, with its progress on a terminal."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from rempart_platform.console.batch_client import BatchClient
from rempart_platform.console.rpc_failure import failed_call
from rempart_protos.v1 import batch_pb2

DEFAULT_ENDPOINT: Final = "/v1/chat/completions"
FINAL_STATUSES: Final = frozenset(
    {
        batch_pb2.BATCH_STATUS_FAILED,
        batch_pb2.BATCH_STATUS_COMPLETED,
        batch_pb2.BATCH_STATUS_EXPIRED,
        batch_pb2.BATCH_STATUS_CANCELLED,
    }
)
_PATIENCE_S: Final = 120.0
"""For how long a router may be away while a batch is waited for: it may be restarted, and the batch goes on."""
_MAX_PEEK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ResultPaths:
    """Where results go."""

    output: Path
    errors: Path

    @classmethod
    def beside(cls, name: Path, output: Path | None, errors: Path | None) -> "ResultPaths":
        """Those that are given, the others named after `name`."""
        stem = name.with_suffix("") if name.suffix == ".jsonl" else name
        return cls(
            output or stem.with_name(f"{stem.name}.output.jsonl"), errors or stem.with_name(f"{stem.name}.errors.jsonl")
        )

    def taken(self) -> Path | None:
        """One that exists already."""
        return next((path for path in (self.output, self.errors) if path.exists()), None)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What to run."""

    input: Path
    endpoint: str | None
    """None takes that of the first line."""
    window: str
    metadata: Mapping[str, str]
    results: ResultPaths
    poll_s: float


def run_batch(
    client: BatchClient, run: BatchRun, console: Console, on_created: Callable[[str], None]
) -> batch_pb2.Batch:
    """The batch when it has ended and its results are written. `on_created` is told its id.

    Raises:
        grpc.RpcError: a call was refused.
        OSError: a file cannot be read or written.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        uploading = progress.add_task("upload", total=run.input.stat().st_size or None)
        endpoint = run.endpoint or _endpoint_of(run.input)
        file = client.upload(run.input, lambda num_bytes: progress.advance(uploading, num_bytes))
        batch = client.create(file.file_id, endpoint, run.window, run.metadata)
        on_created(batch.batch_id)
        batch = _wait(client, batch, run.poll_s, _ShownBatch(progress))
        download_results(client, batch, run.results)
    return batch


def download_results(client: BatchClient, batch: batch_pb2.Batch, results: ResultPaths) -> list[Path]:
    """Writes what the batch has; the files that were written."""
    found = [(batch.output_file_id, results.output), (batch.error_file_id, results.errors)]
    written = [(file_id, path) for file_id, path in found if file_id]
    for file_id, path in written:
        client.download(file_id, path)
    return [path for _, path in written]


def status_text(status: batch_pb2.BatchStatus) -> str:
    """OpenAI's word for it."""
    return batch_pb2.BatchStatus.Name(status).removeprefix("BATCH_STATUS_").lower()


class _ShownBatch:
    """A bar of the lines that are done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("", total=None)

    def show(self, batch: batch_pb2.Batch) -> None:
        counts = batch.counts
        description = status_text(batch.status).replace("_", " ")
        done = counts.completed + counts.failed
        self._progress.update(self._task, description=description, total=counts.total or None, completed=done)


def _wait(client: BatchClient, batch: batch_pb2.Batch, poll_s: float, shown: _ShownBatch) -> batch_pb2.Batch:
    seen = time.monotonic()
    while batch.status not in FINAL_STATUSES:
        shown.show(batch)
        time.sleep(poll_s)
        try:
            batch = client.get(batch.batch_id)
            seen = time.monotonic()
        except grpc.RpcError as error:
            is_away = failed_call(error).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if not is_away or time.monotonic() - seen > _PATIENCE_S:
                raise
    shown.show(batch)
    return batch


def _endpoint_of(path: Path) -> str:
    """What the first line calls. A line that does not say it is refused later, with a reason."""
    if not path.is_file():
        return DEFAULT_ENDPOINT  # what is read of a pipe here, the upload would miss
    with path.open("rb") as lines:
        try:
            url = json.loads(lines.readline(_MAX_PEEK_BYTES))["url"]
        except (ValueError, LookupError, TypeError, RecursionError):
            url = None
    return url if isinstance(url, str) else DEFAULT_ENDPOINT
