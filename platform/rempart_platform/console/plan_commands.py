"""`rempart tenant plan` and `rempart price`: what tenants inherit, and what tokens cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rempart_platform.console.admin_view import (
    DEFAULT_ADDRESS,
    Address,
    AdminKey,
    AsJson,
    call,
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
from rempart_platform.console.standing_options import (
    HEADINGS,
    MaxTier,
    Suspended,
    Weight,
    standing_cells,
    standing_document,
    standing_message,
)
from rempart_platform.tenancy.money import format_price, parse_price

if TYPE_CHECKING:
    from rempart_protos.v1 import admin_pb2

plans = typer.Typer(help="Plans: limits and a standing that tenants inherit.", no_args_is_help=True)
prices = typer.Typer(help="What tokens cost.", no_args_is_help=True)

_PlanName = Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'.")]


@plans.command("set")
@with_limits
def set_plan(  # noqa: PLR0913 - one for each option
    name: _PlanName,
    admin_key: AdminKey,
    limits: "admin_pb2.TenantLimits",
    address: Address = DEFAULT_ADDRESS,
    model: Model = "",
    unset: Unset = None,
    weight: Weight = None,
    max_tier: MaxTier = None,
    suspended: Suspended = None,
    as_json: AsJson = False,
) -> None:
    """Make a plan, or change what is given, and show it."""
    standing = standing_message(weight, max_tier, suspended)
    plan = call(address, admin_key, lambda admin: admin.set_plan(name, limits, model, unset_names(unset), standing))
    _show_plans([plan], as_json=as_json, document=_plan_document(plan))


@plans.command("list")
def list_plans(admin_key: AdminKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show all plans."""
    found = call(address, admin_key, lambda admin: admin.list_plans())
    _show_plans(found, as_json=as_json, document={"plans": [_plan_document(plan) for plan in found]})


@plans.command("remove")
def remove_plan(
    name: _PlanName, admin_key: AdminKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False
) -> None:
    """Remove a plan that no tenant has."""
    call(address, admin_key, lambda admin: admin.remove_plan(name))
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        typer.echo(f"Plan {name} is removed.")


@prices.command("set")
def set_price(
    model: Annotated[str, typer.Argument(help="The model.")],
    admin_key: AdminKey,
    input_price: Annotated[str, typer.Option("--input", help="Of a million prompt tokens.")],
    output_price: Annotated[str, typer.Option("--output", help="Of a million output tokens.")],
    cached_price: Annotated[
        str | None,
        typer.Option("--cached", help="Of a million cached prompt tokens; as --input when not given."),
    ] = None,
    currency: Annotated[str | None, typer.Option(help="Of all money, such as EUR.", show_default=False)] = None,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Set what a model's tokens cost from now on, and show all prices."""
    from rempart_protos.v1 import admin_pb2

    price = admin_pb2.ModelPrice(
        model=model,
        input_nanos=_price(input_price),
        cached_nanos=_price(cached_price or input_price),
        output_nanos=_price(output_price),
    )
    _show_prices(call(address, admin_key, lambda admin: admin.set_price(price, currency)), as_json=as_json)


@prices.command("list")
def list_prices(admin_key: AdminKey, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show all prices, each of a million tokens."""
    _show_prices(call(address, admin_key, lambda admin: admin.list_prices()), as_json=as_json)


def _plan_document(plan: "admin_pb2.Plan") -> dict[str, object]:
    document = standing_document(plan.standing)
    return {
        "name": plan.name,
        "weight": document["weight"],
        "max_tier": document["max_tier"],
        "suspended": document["suspended"],
        "limits": limits_document(plan.limits),
        "models": limits_by_model(plan.model_limits),
        "created_s": plan.created_s,
    }


def _show_plans(found: "Sequence[admin_pb2.Plan]", *, as_json: bool, document: dict[str, object]) -> None:
    if as_json:
        print_json(document)
        return
    headings = HEADINGS[:-1]  # who shares a cache is decided tenant by tenant
    rows, empty = [], [""] * len(headings)
    for plan in found:
        cells = *standing_cells(plan.standing, "default")[:-1], *limit_cells(plan.limits, "default")
        rows.append((plan.name, EVERY_MODEL, *cells, time_text(plan.created_s)))
        rows += [(plan.name, each.model, *empty, *limit_cells(each.limits, "-"), "") for each in plan.model_limits]
    print_table(("plan", "model", *headings, *LIMITS.values(), "created"), rows)


def _show_prices(found: "admin_pb2.PriceList", *, as_json: bool) -> None:
    rows = [
        (price.model, *map(format_price, (price.input_nanos, price.cached_nanos, price.output_nanos)))
        for price in found.prices
    ]
    names = ("model", "input", "cached", "output")
    if as_json:
        prices = [dict(zip(names, row, strict=True)) for row in rows]
        print_json({"currency": found.currency, "prices": prices})
    else:
        unit = f"{found.currency or 'money'}/million"
        print_table(("model", *(f"{name} {unit}" for name in names[1:])), rows)


def _price(text: str) -> int:
    try:
        return parse_price(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
