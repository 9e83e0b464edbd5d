"""What commands share: their options, one call of `rempart.v1.Admin`, and how answers are shown."""

import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rempart_platform.console.admin_client import AdminClient

DEFAULT_ADDRESS = "127.0.0.1:8001"
_PIPE_WIDTH = 1000
_T = TypeVar("_T")

Address: TypeAlias = Annotated[
    str, typer.Option("--address", envvar="REMPART_ADDRESS", help="The router's gRPC address.")
]
ApiKey: TypeAlias = Annotated[str, typer.Option("--key", envvar="REMPART_API_KEY", help="The API key.")]
AdminKey: TypeAlias = Annotated[
    str, typer.Option("--admin-key", "--key", envvar="REMPART_ADMIN_KEY", help="The admin key.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def call(address: str, admin_key: str, act: "Callable[[AdminClient], Awaitable[_T]]") -> _T:
    """The answer; a refusal becomes one line on stderr and exit code 1."""
    import asyncio

    import grpc.aio

    from rempart_platform.console.admin_client import open_admin
    from rempart_platform.console.rpc_failure import describe

    async def run() -> _T:
        async with open_admin(address, admin_key.strip()) as admin:
            return await act(admin)

    try:
        return asyncio.run(run())
    except grpc.aio.AioRpcError as error:
        typer.echo(f"rempart: {describe(error, address)}", err=True)
        raise typer.Exit(1) from None


def time_text(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def print_json(document: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


def print_csv(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    stdout_console().print(table)


def stdout_console() -> "Console":
    """Text is printed as it is. What goes into a pipe is not cut to the width of a terminal that is not there."""
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
