"""`rempart tenant`, `rempart key` and `rempart usage`: one call of `rempart.v1.Admin` each."""

import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from rempart_platform.admin_client import AdminClient
    from rempart_protos.v1 import admin_pb2

tenants = typer.Typer(help="Tenants and their limits.", no_args_is_help=True)
keys = typer.Typer(help="API keys of tenants.", no_args_is_help=True)

_T = TypeVar("_T")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")

_Address = Annotated[str, typer.Option("--address", envvar="REMPART_ADDRESS", help="The router's gRPC address.")]
_AdminKey = Annotated[str, typer.Option("--admin-key", "--key", envvar="REMPART_ADMIN_KEY", help="The admin key.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_TenantName = Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'.")]
_Limit = typer.Option(min=0, help="0 is unlimited.", show_default=False)
DEFAULT_ADDRESS = "127.0.0.1:8001"
_PIPE_WIDTH = 1000


@tenants.command("create")
def create_tenant(
    name: _TenantName,
    admin_key: _AdminKey,
    address: _Address = DEFAULT_ADDRESS,
    requests_per_minute: Annotated[int | None, _Limit] = None,
    tokens_per_minute: Annotated[int | None, _Limit] = None,
    concurrency: Annotated[int | None, _Limit] = None,
    as_json: _AsJson = False,
) -> None:
    """Make a tenant. A limit that is not given is the router's default."""
    limits = _limits(requests_per_minute, tokens_per_minute, concurrency)
    tenant = _call(address, admin_key, lambda admin: admin.create_tenant(name, limits))
    _show_tenants([tenant], _tenant_document(tenant) if as_json else None)


@tenants.command("list")
def list_tenants(admin_key: _AdminKey, address: _Address = DEFAULT_ADDRESS, as_json: _AsJson = False) -> None:
    """Show all tenants."""
    found = _call(address, admin_key, lambda admin: admin.list_tenants())
    _show_tenants(found, {"tenants": [_tenant_document(tenant) for tenant in found]} if as_json else None)


@tenants.command("limits")
def set_limits(
    name: _TenantName,
    admin_key: _AdminKey,
    address: _Address = DEFAULT_ADDRESS,
    requests_per_minute: Annotated[int | None, _Limit] = None,
    tokens_per_minute: Annotated[int | None, _Limit] = None,
    concurrency: Annotated[int | None, _Limit] = None,
    as_json: _AsJson = False,
) -> None:
    """Change the limits that are given, and show all of the tenant's."""
    limits = _limits(requests_per_minute, tokens_per_minute, concurrency)
    tenant = _call(address, admin_key, lambda admin: admin.set_limits(name, limits))
    _show_tenants([tenant], _tenant_document(tenant) if as_json else None)


@keys.command("issue")
def issue_key(
    tenant: _TenantName, admin_key: _AdminKey, address: _Address = DEFAULT_ADDRESS, as_json: _AsJson = False
) -> None:
    """Make a key. It is shown this once."""
    issued = _call(address, admin_key, lambda admin: admin.issue_key(tenant))
    if as_json:
        _print_json({"key": issued.key, "key_id": issued.key_id, "tenant": tenant})
        return
    typer.echo(issued.key)
    typer.echo(f"This is key {issued.key_id}. It cannot be shown again.", err=True)


@keys.command("list")
def list_keys(
    tenant: _TenantName, admin_key: _AdminKey, address: _Address = DEFAULT_ADDRESS, as_json: _AsJson = False
) -> None:
    """Show a tenant's keys, without their secrets."""
    found = _call(address, admin_key, lambda admin: admin.list_keys(tenant))
    if as_json:
        document = [{"key_id": key.key_id, "tenant": key.tenant, "created_s": key.created_s} for key in found]
        _print_json({"keys": document})
        return
    _print_table(("key id", "tenant", "created"), [(key.key_id, key.tenant, _time(key.created_s)) for key in found])


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `key issue` and `key list` give it.")],
    admin_key: _AdminKey,
    address: _Address = DEFAULT_ADDRESS,
    as_json: _AsJson = False,
) -> None:
    """End a key. Routers notice within 5 seconds."""
    _call(address, admin_key, lambda admin: admin.revoke_key(key_id))
    if as_json:
        _print_json({"key_id": key_id, "revoked": True})
    else:
        typer.echo(f"Key {key_id} is revoked.")


def show_usage(
    admin_key: _AdminKey,
    address: _Address = DEFAULT_ADDRESS,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.", show_default=False)] = None,
    as_json: _AsJson = False,
) -> None:
    """Show what tenants used, per model and UTC day."""
    records = _call(address, admin_key, lambda admin: admin.read_usage(tenant))
    names = ("tenant", "model", "day", "requests", "prompt_tokens", "completion_tokens", "cached_tokens")
    rows = [tuple(getattr(record, name) for name in names) for record in records]
    if as_json:
        _print_json({"records": [dict(zip(names, row, strict=True)) for row in rows]})
    else:
        headings = ("tenant", "model", "day", "requests", "prompt", "completion", "cached")
        _print_table(headings, [tuple(map(str, row)) for row in rows])


def _call(address: str, admin_key: str, act: "Callable[[AdminClient], Awaitable[_T]]") -> _T:
    """The answer; a refusal becomes one line on stderr and exit code 1."""
    import asyncio

    import grpc.aio

    from rempart_platform.admin_client import open_admin
    from rempart_platform.rpc_failure import describe

    async def run() -> _T:
        async with open_admin(address, admin_key.strip()) as admin:
            return await act(admin)

    try:
        return asyncio.run(run())
    except grpc.aio.AioRpcError as error:
        typer.echo(f"rempart: {describe(error, address)}", err=True)
        raise typer.Exit(1) from None


def _limits(
    requests_per_minute: int | None, tokens_per_minute: int | None, concurrency: int | None
) -> "admin_pb2.TenantLimits":
    from rempart_protos.v1 import admin_pb2

    return admin_pb2.TenantLimits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, concurrency=concurrency
    )


def _tenant_document(tenant: "admin_pb2.Tenant") -> dict[str, object]:
    """A limit of null is the router's default."""
    values = dict.fromkeys(_LIMITS) | {field.name: value for field, value in tenant.limits.ListFields()}
    return {"name": tenant.name, "limits": values, "created_s": tenant.created_s}


def _show_tenants(found: "Sequence[admin_pb2.Tenant]", document: Mapping[str, object] | None) -> None:
    """As JSON when there is a document."""
    if document is not None:
        _print_json(document)
        return
    rows = []
    for tenant in found:
        set_limits = {field.name: value for field, value in tenant.limits.ListFields()}
        shown = (_shown_limit(set_limits.get(name)) for name in _LIMITS)
        rows.append((tenant.name, *shown, _time(tenant.created_s)))
    _print_table(("tenant", "requests/min", "tokens/min", "concurrency", "created"), rows)


def _shown_limit(limit: int | None) -> str:
    match limit:
        case None:
            return "default"
        case 0:
            return "unlimited"
        case _:
            return str(limit)


def _time(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _print_json(document: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    # What goes into a pipe is not cut to the width of a terminal that is not there.
    Console(markup=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
