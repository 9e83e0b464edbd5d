"""A tenant's or a plan's standing on the command line: its options, and how it is shown."""

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from rempart_protos.v1 import admin_pb2

HEADINGS = ("weight", "max tier", "suspended", "cache group")


class Tier(StrEnum):
    """The classes of `ServiceTier`, which would be heavy to import here."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"
    BATCH = "batch"


Weight: TypeAlias = Annotated[
    float | None, typer.Option(help="Share of the engines, where 1 is usual.", show_default=False)
]
MaxTier: TypeAlias = Annotated[
    Tier | None, typer.Option(help="The highest service tier; default is usual.", show_default=False)
]
Suspended: TypeAlias = Annotated[
    bool | None,
    typer.Option("--suspended/--not-suspended", help="Refuse all requests; what runs goes on.", show_default=False),
]
CacheGroup: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Share the prefix cache with the tenants of this group, who can then notice by the time to the first "
        "token what was asked lately.",
        show_default=False,
    ),
]


def standing_message(
    weight: float | None, max_tier: Tier | None, suspended: bool | None, cache_group: str | None = None
) -> "admin_pb2.Standing":
    """What is not None is set."""
    from rempart_protos.v1 import admin_pb2

    tier = None if max_tier is None else f"SERVICE_TIER_{max_tier.name}"
    return admin_pb2.Standing(weight=weight, max_tier=tier, suspended=suspended, cache_group=cache_group)


def standing_document(standing: "admin_pb2.Standing") -> dict[str, object]:
    """For JSON; what is null is inherited."""
    return {
        "weight": standing.weight if standing.HasField("weight") else None,
        "max_tier": _tier_name(standing) if standing.HasField("max_tier") else None,
        "suspended": standing.suspended if standing.HasField("suspended") else None,
        "cache_group": standing.cache_group if standing.HasField("cache_group") else None,
    }


def standing_cells(standing: "admin_pb2.Standing", inherited: str) -> Sequence[str]:
    """For a table; `inherited` stands for what is not set."""
    weight, max_tier, suspended, group = standing_document(standing).values()
    return (
        inherited if weight is None else f"{weight:g}",
        inherited if max_tier is None else str(max_tier),
        inherited if suspended is None else "yes" if suspended else "no",
        "-" if group is None else str(group),
    )


def _tier_name(standing: "admin_pb2.Standing") -> str:
    from rempart_protos.v1 import inference_pb2

    return inference_pb2.ServiceTier.Name(standing.max_tier).removeprefix("SERVICE_TIER_").lower()
