"""The records of tenants and of plans, changed all at once: nobody sees a limit between two values."""

from collections.abc import Mapping, Sequence
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


async def change_record(
    redis: RedisClient,
    key: str,
    changes: Sequence[RecordChange],
    *,
    created_s: int | None = None,
    ends: Sequence[str] = (),
) -> bool:
    """Changes a record. False when there is none.

    Args:
        redis: where it is.
        key: of it.
        changes: what to change.
        created_s: makes it first where it is not there; None makes none.
        ends: fields that go in any case.
    """
    removed = [*ends, *(field for change in changes for field in change.removed())]
    written = [part for change in changes for pair in change.written().items() for part in pair]
    made = "" if created_s is None else created_s
    (is_there,) = await redis.run_script(_CHANGE, (key,), (made, len(removed), *removed, *written))
    return is_there == 1
