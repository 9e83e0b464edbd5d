"""`rempart tenant`, `rempart key` and `rempart usage`: one or two calls of `rempart.v1.Admin` each."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rempart_platform.console.admin_view import (
    DEFAULT_ADDRESS,
    Address,
    AdminKey,
    AsJson,
    call,
    print_csv,
    print_json,
    print_table,
    time_text,
)
from rempart_platform.console.limit_options import (
    EVERY_MODEL,
    LIMITS,
    Model,
    Unset,
    limit_cells,
    limits_by_model,
    limits_document,
    unset_names,
    with_limits,
)
from rempart_platform.console.plan_commands import plans
from rempart_platform.console.standing_options import (
    HEADINGS,
    CacheGroup,
    MaxTier,
    Suspended,
    Weight,
    standing_cells,
    standing_document,
    standing_message,
)
from rempart_platform.tenancy.money import format_money

if TYPE_CHECKING:
    from rempart_protos.v1 import admin_pb2

tenants = typer.Typer(help="Tenants, their plans and limits.", no_args_is_help=True)
tenants.add_typer(plans, name="plan")
keys = typer.Typer(help="API keys of tenants.", no_args_is_help=True)

_TenantName = Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'.")]
_KeyId = Annotated[str, typer.Argument(help="As `key issue` and `key list` give it.")]
_Days = Annotated[
    float | None, typer.Option("--expires-in-days", min=0, help="When the key ends by itself.", show_default=False)
]
_DAY_S = 86_400


@tenants.command("create")
@with_limits
def create_tenant(  # noqa: PLR0913 - one for each option
    name: _TenantName,
    admin_key: AdminKey,
    limits: "admin_pb2.TenantLimits",
    address: Address = DEFAULT_ADDRESS,
    plan: Annotated[str, typer.Option(help="Whose limits and standing it inherits.", show_default=False)] = "",
    weight: Weight = None,
    max_tier: MaxTier = None,
    suspended: Suspended = None,
    cache_group: CacheGroup = None,
    as_json: AsJson = False,
) -> None:
    """Make a tenant. A limit that is not given is the plan's, or the router's default."""
    standing = standing_message(weight, max_tier, suspended, cache_group)
    tenant = call(address, admin_key, lambda admin: admin.create_tenant(name, limits, plan, standing))
    _show_tenants([tenant], _tenant_document(tenant) if as_json else None)


@tenants.command("list")
def list_tenants(admin_key: AdminKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show all tenants."""
    found = call(address, admin_key, lambda admin: admin.list_tenants())
    _show_tenants(found, {"tenants": [_tenant_document(tenant) for tenant in found]} if as_json else None)


@tenants.command("limits")
@with_limits
def set_limits(
    name: _TenantName,
    admin_key: AdminKey,
    limits: "admin_pb2.TenantLimits",
    address: Address = DEFAULT_ADDRESS,
    model: Model = "",
    unset: Unset = None,
    as_json: AsJson = False,
) -> None:
    """Change the limits that are given, and show all of the tenant's."""
    tenant = call(address, admin_key, lambda admin: admin.set_limits(name, limits, model, unset_names(unset)))
    _show_tenants([tenant], _tenant_document(tenant) if as_json else None)


@tenants.command("set")
def set_standing(  # noqa: PLR0913 - one for each option
    name: _TenantName,
    admin_key: AdminKey,
    address: Address = DEFAULT_ADDRESS,
    weight: Weight = None,
    max_tier: MaxTier = None,
    suspended: Suspended = None,
    cache_group: CacheGroup = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(help="What is to be inherited again, such as weight; may be given again.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change how a tenant stands beside the others, and show it. Routers notice within 5 seconds."""
    standing = standing_message(weight, max_tier, suspended, cache_group)
    tenant = call(address, admin_key, lambda admin: admin.set_standing(name, standing, unset_names(unset)))
    _show_tenants([tenant], _tenant_document(tenant) if as_json else None)


@tenants.command("move")
def move_tenant(
    name: _TenantName,
    admin_key: AdminKey,
    plan: Annotated[str, typer.Argument(help="The plan; none when not given.", show_default=False)] = "",
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Give a tenant another plan."""
    tenant = call(address, admin_key, lambda admin: admin.set_tenant_plan(name, plan))
    _show_tenants([tenant], _tenant_document(tenant) if as_json else None)


@keys.command("issue")
@with_limits
def issue_key(
    tenant: _TenantName,
    admin_key: AdminKey,
    limits: "admin_pb2.TenantLimits",
    address: Address = DEFAULT_ADDRESS,
    days: _Days = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once. Limits are of its own use, beside the tenant's."""
    issued = call(address, admin_key, lambda admin: admin.issue_key(tenant, limits, _expires_s(days)))
    if as_json:
        print_json({"key": issued.key, "key_id": issued.key_id, "tenant": tenant})
        return
    typer.echo(issued.key)
    typer.echo(f"This is key {issued.key_id}. It cannot be shown again.", err=True)


@keys.command("list")
def list_keys(
    tenant: _TenantName, admin_key: AdminKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False
) -> None:
    """Show a tenant's keys, without their secrets."""
    found = call(address, admin_key, lambda admin: admin.list_keys(tenant))
    _show_keys(found, {"keys": [_key_document(key) for key in found]} if as_json else None)


@keys.command("limits")
@with_limits
def set_key_limits(
    key_id: _KeyId,
    admin_key: AdminKey,
    limits: "admin_pb2.TenantLimits",
    address: Address = DEFAULT_ADDRESS,
    unset: Unset = None,
    days: _Days = None,
    never_expires: Annotated[bool, typer.Option("--never-expires", help="Take back its expiry.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change a key's own limits and its expiry, and show all of them. Routers notice within 5 seconds."""
    expires_s = 0 if never_expires else _expires_s(days)
    key = call(address, admin_key, lambda admin: admin.set_key_limits(key_id, limits, unset_names(unset), expires_s))
    _show_keys([key], _key_document(key) if as_json else None)


@keys.command("revoke")
def revoke_key(
    key_id: _KeyId,
    admin_key: AdminKey,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """End a key. Routers notice within 5 seconds."""
    call(address, admin_key, lambda admin: admin.revoke_key(key_id))
    if as_json:
        print_json({"key_id": key_id, "revoked": True})
    else:
        typer.echo(f"Key {key_id} is revoked.")


def show_usage(
    admin_key: AdminKey,
    address: Address = DEFAULT_ADDRESS,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.", show_default=False)] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Show what tenants used and what it cost, per model and UTC day."""
    answer = call(address, admin_key, lambda admin: admin.read_usage(tenant))
    counts = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
    names = ("tenant", "model", "day", *counts, "cost")
    rows = [
        (*(getattr(record, name) for name in names[:-1]), format_money(record.cost_nanos)) for record in answer.records
    ]
    if as_json:
        records = [dict(zip(names, row, strict=True)) for row in rows]
        print_json({"records": records, "currency": answer.currency})
    elif as_csv:
        print_csv((*names, "currency"), [(*row, answer.currency) for row in rows])
    else:
        cost = f"cost {answer.currency}".rstrip()
        headings = ("tenant", "model", "day", "requests", "prompt", "completion", "cached", cost)
        print_table(headings, [tuple(map(str, row)) for row in rows])


def _expires_s(days: float | None) -> int | None:
    return None if days is None else int(time.time() + days * _DAY_S)


def _tenant_document(tenant: "admin_pb2.Tenant") -> dict[str, object]:
    """A limit of null is inherited."""
    return {
        "name": tenant.name,
        "plan": tenant.plan or None,
        **standing_document(tenant.standing),
        "limits": limits_document(tenant.limits),
        "models": limits_by_model(tenant.model_limits),
        "created_s": tenant.created_s,
    }


def _show_tenants(found: "Sequence[admin_pb2.Tenant]", document: Mapping[str, object] | None) -> None:
    """As JSON when there is a document."""
    if document is not None:
        print_json(document)
        return
    rows = []
    for tenant in found:
        inherited = "plan" if tenant.plan else "default"
        cells = *standing_cells(tenant.standing, inherited), *limit_cells(tenant.limits, inherited)
        rows.append((tenant.name, tenant.plan or "-", EVERY_MODEL, *cells, time_text(tenant.created_s)))
        empty = [""] * len(HEADINGS)
        rows += [
            (tenant.name, "", each.model, *empty, *limit_cells(each.limits, "-"), "") for each in tenant.model_limits
        ]
    print_table(("tenant", "plan", "model", *HEADINGS, *LIMITS.values(), "created"), rows)


def _key_document(key: "admin_pb2.ApiKey") -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "created_s": key.created_s,
        "expires_s": key.expires_s or None,
        "limits": limits_document(key.limits),
    }


def _show_keys(found: "Sequence[admin_pb2.ApiKey]", document: Mapping[str, object] | None) -> None:
    """As JSON when there is a document."""
    if document is not None:
        print_json(document)
        return
    rows = [
        (
            *(key.key_id, key.tenant, *limit_cells(key.limits, "-")),
            *(time_text(key.created_s), time_text(key.expires_s) if key.expires_s else "never"),
        )
        for key in found
    ]
    print_table(("key id", "tenant", *LIMITS.values(), "created", "expires"), rows)
