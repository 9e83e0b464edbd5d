"""Records of tenants, plans and keys, changed all at once: nobody sees a limit between two values, or half a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisClient

_CHANGE = load_script("change_record", shared="")


class RecordChange(Protocol):
    """What to change of a record; all else stays."""

    def written(self) -> Mapping[str, str | int]:
        """Fields to set."""

    def removed(self) -> list[str]:
        """Fields to delete."""


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A change of fields by their names."""

    values: Mapping[str, str | int] = field(default_factory=dict)
    unset: tuple[str, ...] = ()

    def written(self) -> Mapping[str, str | int]:
        return self.values

    def removed(self) -> list[str]:
        return list(self.unset)


async def change_record(
    redis: RedisClient, key: str, changes: Sequence[RecordChange], *, created_s: int | None = None
) -> bool:
    """Changes a record. False when there is none; `created_s` makes one first."""
    removed = [name for change in changes for name in change.removed()]
    written = [part for change in changes for pair in change.written().items() for part in pair]
    made = "" if created_s is None else created_s
    (is_there,) = await redis.run_script(_CHANGE, (key,), (made, len(removed), *removed, *written))
    return is_there == 1
