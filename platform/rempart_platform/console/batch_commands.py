"""`rempart batch`: batch jobs of a tenant, over `rempart.v1.Batches`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rempart_platform.console.admin_view import (
    DEFAULT_ADDRESS,
    Address,
    ApiKey,
    AsJson,
    print_json,
    print_table,
    time_text,
)

if TYPE_CHECKING:
    from rempart_platform.console.batch_client import BatchClient
    from rempart_platform.console.batch_run import ResultPaths
    from rempart_protos.v1 import batch_pb2

batches = typer.Typer(help="Batch jobs: a file of requests in, a file of answers out.", no_args_is_help=True)

_T = TypeVar("_T")
_BatchId = Annotated[str, typer.Argument(help="As `batch run` and `batch list` give it.")]
_Output = Annotated[
    Path | None, typer.Option(help="Gets the answers; NAME.output.jsonl when not given.", show_default=False)
]
_Errors = Annotated[
    Path | None, typer.Option(help="Gets the errors; NAME.errors.jsonl when not given.", show_default=False)
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace result files that exist.")]


@batches.command("run")
def run(  # noqa: PLR0913 - a flag is a parameter
    requests: Annotated[Path, typer.Argument(metavar="INPUT.jsonl", help="One request a line, as OpenAI has them.")],
    key: ApiKey,
    address: Address = DEFAULT_ADDRESS,
    endpoint: Annotated[
        str | None,
        typer.Option(help="What the lines call; the first line's when not given, a pipe's: chat.", show_default=False),
    ] = None,
    window: Annotated[str, typer.Option(help="Hours after which the batch ends with what it has.")] = "24h",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label; may be given again.", show_default=False)
    ] = None,
    output: _Output = None,
    errors: _Errors = None,
    overwrite: _Overwrite = False,
    poll_s: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks at the progress.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Upload a file, run it, and fetch the results. Exit code 0 when every line was answered with success."""
    from rich.console import Console

    from rempart_platform.console.batch_run import BatchRun, ResultPaths, run_batch

    results = ResultPaths.beside(requests, output, errors)
    _check_results(results, overwrite)
    labels = dict(_label(text) for text in metadata or ())
    started: list[str] = []

    def show_id(batch_id: str) -> None:
        started.append(batch_id)
        typer.echo(batch_id, err=True)

    what = BatchRun(requests, endpoint, window, labels, results, poll_s)
    console = Console(stderr=True)
    try:
        batch = _call(address, key, lambda client: run_batch(client, what, console, show_id))
    except KeyboardInterrupt:
        if started:
            typer.echo(f"rempart: {started[0]} goes on; `rempart batch download {started[0]}` fetches it", err=True)
        raise typer.Exit(130) from None
    _show(batch, as_json)
    for file_id, path in ((batch.output_file_id, results.output), (batch.error_file_id, results.errors)):
        if file_id:
            typer.echo(str(path), err=True)
    raise typer.Exit(0 if batch.counts.total and batch.counts.completed == batch.counts.total else 1)


@batches.command("list")
def list_batches(
    key: ApiKey,
    address: Address = DEFAULT_ADDRESS,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most batches to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the newest batches."""
    found = _call(address, key, lambda client: client.list(limit))
    if as_json:
        print_json({"batches": [_document(batch) for batch in found]})
    else:
        _print_batches(found)


@batches.command("show")
def show_batch(batch_id: _BatchId, key: ApiKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show one batch, with what is wrong with its input."""
    _show(_call(address, key, lambda client: client.get(batch_id)), as_json)


@batches.command("cancel")
def cancel(batch_id: _BatchId, key: ApiKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """End a batch; what it has answered by then is kept."""
    _show(_call(address, key, lambda client: client.cancel(batch_id)), as_json)


@batches.command("download")
def download(
    batch_id: _BatchId,
    key: ApiKey,
    address: Address = DEFAULT_ADDRESS,
    output: _Output = None,
    errors: _Errors = None,
    overwrite: _Overwrite = False,
) -> None:
    """Fetch the results of a batch that has ended; prints the files that were written."""
    from rempart_platform.console.batch_run import FINAL_STATUSES, ResultPaths, download_results, status_text

    results = ResultPaths.beside(Path(batch_id), output, errors)
    _check_results(results, overwrite)

    def fetch(client: "BatchClient") -> list[Path]:
        batch = client.get(batch_id)
        if batch.status not in FINAL_STATUSES:
            typer.echo(f"rempart: {batch_id} has not ended: it is {status_text(batch.status)}", err=True)
            raise typer.Exit(1)
        return download_results(client, batch, results)

    for path in _call(address, key, fetch):
        typer.echo(str(path))


def _call(address: str, key: str, act: "Callable[[BatchClient], _T]") -> _T:
    """The answer; a refusal, or a file that cannot be read, becomes one line on stderr and exit code 1."""
    import grpc

    from rempart_platform.console.batch_client import open_batches
    from rempart_platform.console.rpc_failure import describe, failed_call

    try:
        with open_batches(address, key.strip()) as client:
            return act(client)
    except grpc.RpcError as error:
        typer.echo(f"rempart: {describe(failed_call(error), address)}", err=True)
    except OSError as error:
        typer.echo(f"rempart: {error}", err=True)
    raise typer.Exit(1)


def _check_results(results: "ResultPaths", overwrite: bool) -> None:
    """Before anything is done whose results would be lost."""
    if results.output == results.errors:
        raise typer.BadParameter("answers and errors need a file each", param_hint="--output, --errors")
    taken = None if overwrite else results.taken()
    if taken is not None:
        typer.echo(f"rempart: {taken} exists; --overwrite replaces it", err=True)
        raise typer.Exit(2)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--metadata")
    return name, value


def _show(batch: "batch_pb2.Batch", as_json: bool) -> None:
    if as_json:
        print_json(_document(batch))
        return
    _print_batches([batch])
    for error in batch.errors:
        typer.echo(f"line {error.line}: {error.message}" if error.line else error.message)


def _print_batches(found: "list[batch_pb2.Batch]") -> None:
    from rempart_platform.console.batch_run import status_text

    rows = [
        (
            batch.batch_id,
            status_text(batch.status),
            batch.model,
            f"{batch.counts.completed} + {batch.counts.failed} of {batch.counts.total}",
            time_text(batch.created_s),
            time_text(batch.expires_s),
        )
        for batch in found
    ]
    print_table(("batch", "status", "model", "answers + errors", "created", "expires"), rows)


def _document(batch: "batch_pb2.Batch") -> dict[str, object]:
    """All that is known of it; null where it did not come to that."""
    from rempart_platform.console.batch_run import status_text

    times = ("in_progress_s", "finalizing_s", "completed_s", "failed_s", "expired_s", "cancelling_s", "cancelled_s")
    return {
        "batch_id": batch.batch_id,
        "status": status_text(batch.status),
        "endpoint": batch.endpoint,
        "model": batch.model or None,
        "completion_window": batch.completion_window,
        "metadata": dict(batch.metadata),
        "total": batch.counts.total,
        "completed": batch.counts.completed,
        "failed": batch.counts.failed,
        "errors": [
            {"code": each.code, "message": each.message, "param": each.param or None, "line": each.line or None}
            for each in batch.errors
        ],
        "input_file_id": batch.input_file_id,
        "output_file_id": batch.output_file_id or None,
        "error_file_id": batch.error_file_id or None,
        "created_s": batch.created_s,
        "expires_s": batch.expires_s,
        **{name: getattr(batch, name) if batch.HasField(name) else None for name in times},
    }
