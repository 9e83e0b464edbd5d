"""What may be limited, and where each limit is kept.

A request counts in up to three accounts: its tenant's, that of its model within the tenant, and its key's. It must fit
all of them, so a key or a model may be narrower than its tenant, never wider. In each account the most specific value
that is set holds:

    tenant's account         tenant ─► its plan ─► the router's default
    account of its model     tenant's limits of the model ─► its plan's limits of the model ─► unlimited
    key's account            key ─► unlimited

A hash keeps them under these fields: "<limit>", "model <limit> <model>", "key <limit> <key id>".
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from rempart_platform.errors import ErrorKind, RempartError

# Sums stay exact in Lua, whose numbers are doubles.
MAX_LIMIT = 10**12
MAX_MONEY = 10**15
"""A million of the currency."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What may be used. None: inherited; 0: unlimited. Money is in billionths of the operator's currency."""

    requests_per_minute: int | None = None
    """In any 60 seconds."""
    tokens_per_minute: int | None = None
    """In any 60 seconds, of prompts and outputs together."""
    concurrency: int | None = None
    """Requests in flight."""
    concurrent_tokens: int | None = None
    """Tokens in flight, each request at its worst case."""
    tokens_per_day: int | None = None
    """Days and months are UTC's."""
    tokens_per_month: int | None = None
    """Of UTC's calendar."""
    money_per_day: int | None = None
    """In the operator's currency."""
    money_per_month: int | None = None
    """In the operator's currency."""

    def only_set(self) -> dict[str, int]:
        values = {limit: getattr(self, limit) for limit in LIMITS}
        return {name: value for name, value in values.items() if value is not None}

    def inherit(self, other: "TenantLimits") -> "TenantLimits":
        """These, and the other's where these are not set."""
        return TenantLimits(**{**other.only_set(), **self.only_set()})

    def numbers(self) -> list[int]:
        """All limits in order; 0 where none is set."""
        return [getattr(self, limit) or 0 for limit in LIMITS]


LIMITS = tuple(limit.name for limit in fields(TenantLimits))
"""Names of all limits, in the order of `scripts/reserve.lua`."""


@dataclass(frozen=True, slots=True)
class LimitChange:
    """What to change of stored limits; all others stay.

    Raises:
        RempartError: INVALID_REQUEST when a value is out of range, or a name of `unset` is no limit.
    """

    limits: TenantLimits = TenantLimits()
    """Those that are set take these values."""
    unset: tuple[str, ...] = ()
    """Names of limits that are to be inherited again."""
    model: str = ""
    """Of this model; "" for all together."""
    key_id: str = ""
    """Of this key, instead."""

    def __post_init__(self) -> None:
        for name, value in self.limits.only_set().items():
            largest = MAX_MONEY if name.startswith("money") else MAX_LIMIT
            if not 0 <= value <= largest:
                text = f"'{name}' must be between 0 and {largest}."
                raise RempartError(ErrorKind.INVALID_REQUEST, text, param=f"limits.{name}")
        for name in self.unset:
            if name not in LIMITS:
                raise RempartError(ErrorKind.INVALID_REQUEST, f"There is no limit '{name[:63]}'.", param="unset")

    def written(self) -> dict[str, int]:
        """Fields to set."""
        return {self._field(name): value for name, value in self.limits.only_set().items()}

    def removed(self) -> list[str]:
        """Fields to delete."""
        return [self._field(name) for name in self.unset]

    def _field(self, limit: str) -> str:
        if self.key_id:
            return f"key {limit} {self.key_id}"
        return f"model {limit} {self.model}" if self.model else limit


@dataclass(frozen=True, slots=True)
class LimitSet:
    """The limits of a tenant or of a plan."""

    own: TenantLimits = TenantLimits()
    of_models: Mapping[str, TenantLimits] = field(default_factory=dict)
    """Of the use of single models."""
    of_keys: Mapping[str, TenantLimits] = field(default_factory=dict)
    """By key id; a plan has none."""

    @staticmethod
    def parse(stored: Mapping[str, str]) -> "LimitSet":
        """The limits in a stored hash."""
        own = {name: int(stored[name]) for name in LIMITS if name in stored}
        return LimitSet(TenantLimits(**own), _limits_by_name(stored, "model "), _limits_by_name(stored, "key "))

    def of_model(self, model: str) -> TenantLimits:
        return self.of_models.get(model, TenantLimits())

    def written(self) -> dict[str, int]:
        """All limits that are set, of all models together and of single ones, by the fields that keep them."""
        fields = dict(self.own.only_set())
        for model, limits in self.of_models.items():
            fields |= LimitChange(limits, model=model).written()
        return fields


def _limits_by_name(stored: Mapping[str, str], prefix: str) -> dict[str, TenantLimits]:
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for stored_name, value in stored.items():
        if stored_name.startswith(prefix):
            # The name comes last, because only it may hold a space.
            limit, name = stored_name.removeprefix(prefix).split(" ", 1)
            if limit in LIMITS:
                found[name][limit] = int(value)
    return {name: TenantLimits(**limits) for name, limits in sorted(found.items())}
