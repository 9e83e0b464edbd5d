"""Limits on the command line: an option for each, and how those that are set are shown."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from rempart_platform.tenancy.money import format_money, parse_money

if TYPE_CHECKING:
    from rempart_protos.v1 import admin_pb2

EVERY_MODEL = "(all)"
"""Stands in tables where limits are of no model alone."""
LIMITS = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "concurrency": "concurrency",
    "concurrent_tokens": "concurrent tokens",
    "tokens_per_day": "tokens/day",
    "tokens_per_month": "tokens/month",
    "money_per_day": "money/day",
    "money_per_month": "money/month",
}
"""Name and heading of each; the names are those of `TenantLimits`, which would be heavy to import here."""
_MEANINGS = {
    "requests_per_minute": "Requests in any 60 seconds",
    "tokens_per_minute": "Tokens in any 60 seconds, of prompts and outputs",
    "concurrency": "Requests in flight",
    "concurrent_tokens": "Tokens in flight, each request at its worst case",
    "tokens_per_day": "Tokens of a UTC day",
    "tokens_per_month": "Tokens of a UTC month",
    "money_per_day": "Cost of a UTC day, by `rempart price`",
    "money_per_month": "Cost of a UTC month, by `rempart price`",
}

Model: TypeAlias = Annotated[
    str, typer.Option(help="Limits of this model's use, beside those of all together.", show_default=False)
]
Unset: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="A limit to be inherited again, such as tokens-per-day; may be given again.", show_default=False),
]


def with_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, which takes the message `limits`, an option for every limit instead of it."""

    @functools.wraps(command)
    def run(**given: object) -> None:
        from rempart_protos.v1 import admin_pb2

        limits = {name: given.pop(name) for name in LIMITS}
        message = admin_pb2.TenantLimits()
        for name, value in limits.items():
            if value is not None:
                setattr(message, name, value)
        command(**given, limits=message)

    own = [each for each in inspect.signature(command).parameters.values() if each.name != "limits"]
    options = [_option(name) for name in LIMITS]
    # Typer reads these.
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + options
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def unset_names(unset: Sequence[str] | None) -> list[str]:
    """The limits of `--unset`, which may be written as their options are."""
    return [name.replace("-", "_") for name in unset or ()]


def limits_document(limits: "admin_pb2.TenantLimits") -> dict[str, object]:
    """All limits for JSON; one of null is inherited, and money is a decimal."""
    values = {field.name: value for field, value in limits.ListFields()}
    return {
        name: format_money(values[name]) if name in values and _is_money(name) else values.get(name) for name in LIMITS
    }


def limit_cells(limits: "admin_pb2.TenantLimits", inherited: str) -> Sequence[str]:
    """All limits for a table; `inherited` stands for one that is not set."""
    return [_cell(value, inherited) for value in limits_document(limits).values()]


def limits_by_model(messages: "Sequence[admin_pb2.ModelLimits]") -> dict[str, object]:
    """For JSON."""
    return {each.model: limits_document(each.limits) for each in messages}


def _cell(value: object, inherited: str) -> str:
    if value is None:
        return inherited
    return "unlimited" if value in (0, format_money(0)) else str(value)


def _is_money(name: str) -> bool:
    return name.startswith("money")


def _option(name: str) -> inspect.Parameter:
    text = f"{_MEANINGS[name]}; 0 is unlimited."
    if _is_money(name):
        option = typer.Option(parser=_money, metavar="AMOUNT", help=text, show_default=False)
    else:
        option = typer.Option(min=0, help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[int | None, option]
    )


def _money(text: str) -> int:
    try:
        return parse_money(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
