"""`rempart audit`: checks and reads the audit logs of all routers. It asks storage itself; no router has to run.

What is heavy to import is imported by the command that needs it.
"""

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeAlias, TypeVar

import typer

from rempart_platform.audit.values import Kind
from rempart_platform.console.admin_view import AsJson, print_json

if TYPE_CHECKING:
    from rempart_platform.audit.heads import HeadStore
    from rempart_platform.audit.store import SegmentStore
    from rempart_platform.audit.verify import Verification

audit = typer.Typer(help="The audit log: check it, read it.", no_args_is_help=True)

_T = TypeVar("_T")
_Url: TypeAlias = Annotated[str, typer.Argument(help="file:///FOLDER or s3://BUCKET/PREFIX, as the routers write it.")]
_REDIS_TIMEOUT_S = 10.0
_CANNOT = 2
"""The exit code when nothing could be checked."""


@audit.command("verify")
def verify_log(
    url: _Url,
    redis_url: Annotated[
        str,
        typer.Option(
            envvar="REMPART_REDIS_URL",
            help="The routers' Redis, which knows how far every chain was; without it a missing end goes unnoticed.",
            show_default=False,
        ),
    ] = "",
    public_key: Annotated[
        Path | None,
        typer.Option(help="Whose owner must have signed all of it: an ed25519 key, PEM.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every record of every chain; name the first bad one of each, and leave with 1 when there is any."""
    from rempart_platform.audit.signing import SigningKeyError, read_public_key
    from rempart_platform.audit.verify import verify

    try:
        key = read_public_key(public_key) if public_key else None
    except SigningKeyError as error:
        _fail(f"--public-key: {error}")

    async def check(store: "SegmentStore") -> "Verification":
        async with _heads(redis_url) as heads:
            with _progress() as show:
                return await verify(store, heads=heads, public_key=key, progress=show)

    done = _run(url, check)
    if not done.num_chains:
        _fail(f"{url} holds no audit log")
    counts = {"chains": done.num_chains, "segments": done.num_segments, "records": done.num_records}
    if as_json:
        print_json({**counts, "removed": done.num_removed, "lost": done.num_lost, "problems": done.problems})
    else:
        typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()) + " checked")
        if done.num_removed:
            typer.echo(f"{done.num_removed} older records were removed for their age")
        if done.num_lost:
            typer.echo(f"{done.num_lost} records could not be kept: rempart audit show --kind gap tells when", err=True)
        for problem in done.problems:
            typer.echo(_printable(problem), err=True)
    raise typer.Exit(1 if done.problems else 0)


@audit.command("show")
def show_log(
    url: _Url,
    tenant: Annotated[str, typer.Option(help="What concerns this tenant alone.", show_default=False)] = "",
    day: Annotated[str, typer.Option(help="Of this UTC day alone, as 2026-11-25.", show_default=False)] = "",
    kind: Annotated[Kind | None, typer.Option(help="Of this kind alone.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print records as they are, one a line.")] = False,
) -> None:
    """Print records, chain by chain. Nothing is checked: that does `rempart audit verify`."""
    from rempart_platform.audit.verify import Wanted, read_records

    if day and not _is_day(day):
        _fail(f"--day: {day!r} is no day such as 2026-11-25")

    async def show(store: "SegmentStore") -> None:
        async for record in read_records(store, Wanted(tenant, day, kind or "")):
            sys.stdout.write((json.dumps(record) if as_json else _one_line(record)) + "\n")

    _run(url, show)


def _is_day(text: str) -> bool:
    """In the one form that the log has."""
    from datetime import date

    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _one_line(record: dict[str, object]) -> str:
    at, kind = record.pop("at", ""), record.pop("kind", "")
    shown = {name: value for name, value in record.items() if name not in ("previous", "chain", "n")}
    rest = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in shown.items())
    return _printable(f"{at}  {kind:8}{rest}")


def _printable(text: str) -> str:
    """Escapes what a terminal would obey: anybody may call the Admin service, and what they asked for is recorded."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _run(url: str, act: "Callable[[SegmentStore], Awaitable[_T]]") -> _T:
    """The answer; a store or a Redis that cannot be asked becomes one line on stderr and exit code 2."""
    import asyncio

    from rempart_platform.audit.store import STORE_ERRORS, SegmentStore
    from rempart_platform.errors import RempartError
    from rempart_platform.object_store import ObjectStoreUrlError, open_object_store

    async def run() -> _T:
        return await act(SegmentStore(open_object_store(url, for_reading=True)))

    try:
        return asyncio.run(run())
    except ObjectStoreUrlError as error:
        _fail(str(error))
    except RempartError:
        _fail("--redis-url: Redis does not answer")
    except BrokenPipeError:
        raise  # of whoever reads our lines, and not of the store
    except STORE_ERRORS as error:
        _fail(f"{url} cannot be read: {error}".partition("\n")[0])


def _fail(message: str) -> NoReturn:
    typer.echo(f"rempart audit: {message}", err=True)
    raise typer.Exit(_CANNOT)


@asynccontextmanager
async def _heads(redis_url: str) -> "AsyncIterator[HeadStore | None]":
    from rempart_platform.audit.heads import HeadStore
    from rempart_platform.tenancy.redis_client import RedisConfig, connect_redis

    if not redis_url:
        yield None
        return
    async with AsyncExitStack() as stack:
        config = RedisConfig(redis_url, timeout_s=_REDIS_TIMEOUT_S)
        try:
            redis = await stack.enter_async_context(connect_redis(config))
        except ValueError as error:
            _fail(f"--redis-url: {error}")
        yield HeadStore(redis)


@contextmanager
def _progress() -> "Iterator[Callable[[Verification], None]]":
    """Shown to a person alone; how much there is to check is not known before the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done: progress.update(
            task, description=f"chain {done.num_chains}, {done.num_segments} segments, {done.num_records} records"
        )
