"""How tenants stand beside each other: what is kept of it in the records of tenants and plans, and how it is changed.

    weight, max_tier    tenant ─► its plan ─► 1, "default"
    suspended           tenant ─► its plan ─► no
    cache_group         the tenant's own, or none

The fields of the hash have these names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from rempart_platform.errors import invalid_request
from rempart_platform.generation import ServiceTier, Standing
from rempart_platform.tenancy.names import require_name

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
STANDING = ("weight", "max_tier", "cache_group", "suspended")
"""Names of all that may be set."""
TIERS = {tier.name.lower(): tier for tier in ServiceTier}
_SWITCHES = {"0": False, "1": True}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class OwnStanding:
    """What a record itself says. None: inherited."""

    weight: float | None = None
    max_tier: ServiceTier | None = None
    cache_group: str | None = None
    """Never of a plan: who shares a cache is decided tenant by tenant."""
    suspended: bool | None = None

    @staticmethod
    def parse(stored: Mapping[str, str]) -> "OwnStanding":
        """A record that somebody spoiled must stop neither its tenant nor the queue: what is no value is not set."""
        return OwnStanding(
            _weight(stored.get("weight")),
            TIERS.get(stored.get("max_tier", "")),
            stored.get("cache_group"),
            _SWITCHES.get(stored.get("suspended", "")),
        )

    def inherit(self, plan: "OwnStanding") -> Standing:
        """What holds for a tenant that has this of its own and that plan."""
        default = Standing()
        return Standing(
            weight=_first(self.weight, plan.weight, default.weight),
            max_tier=_first(self.max_tier, plan.max_tier, default.max_tier),
            cache_group=self.cache_group or default.cache_group,
            is_suspended=_first(self.suspended, plan.suspended, default.is_suspended),
        )

    def written(self) -> dict[str, str]:
        """Fields of what is set."""
        fields = {
            "weight": None if self.weight is None else repr(self.weight),
            "max_tier": None if self.max_tier is None else self.max_tier.name.lower(),
            "cache_group": self.cache_group,
            "suspended": None if self.suspended is None else str(int(self.suspended)),
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class StandingChange:
    """What to change of a standing; all else stays.

    Raises:
        RempartError: INVALID_REQUEST when a value is out of range, or a name of `unset` is none.
    """

    own: OwnStanding = OwnStanding()
    """What is set takes these values."""
    unset: tuple[str, ...] = ()
    """Names of what is to be inherited again."""

    def __post_init__(self) -> None:
        weight, group = self.own.weight, self.own.cache_group
        if weight is not None and not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise invalid_request(f"'weight' must be between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}.", "standing.weight")
        if group is not None:
            require_name(group, "'cache_group'", "standing.cache_group")
        for name in self.unset:
            if name not in STANDING:
                raise invalid_request(f"There is no '{name[:63]}' of a standing.", "unset")

    def written(self) -> dict[str, str]:
        return self.own.written()

    def removed(self) -> list[str]:
        return list(self.unset)


def _weight(stored: str | None) -> float | None:
    try:
        weight = float(stored or "")
    except ValueError:
        return None
    return weight if MIN_WEIGHT <= weight <= MAX_WEIGHT else None


def _first(own: _T | None, plan: _T | None, default: _T) -> _T:
    if own is not None:
        return own
    return plan if plan is not None else default
