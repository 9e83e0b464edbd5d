"""Who asked for a batch, looked at again: a job outlives the request that made it."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, ServiceTier, Standing
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyRecord, is_key_id
from rempart_platform.tenancy.memory import Memory

_CAPACITY = 1000


class Standings(Protocol):
    """How tenants stand; `tenancy.standings.Standings` in production."""

    async def of(self, tenant: str) -> Standing:
        """Raises RempartError UNAVAILABLE."""
        ...


class BatchCallers:
    """Callers as they are now.

    Args:
        keys: where keys are found.
        standings: how tenants stand.
        has_tenant: whether there is a tenant of that name; raises RempartError UNAVAILABLE. Asked for callers that came
            with a token of an issuer, which says no more once it has expired.
        memory_s: how long a key is remembered; a revoked one works at most that long.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        keys: ApiKeyStore,
        standings: Standings,
        has_tenant: Callable[[str], Awaitable[bool]],
        *,
        memory_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._standings = standings
        self._has_tenant = has_tenant
        self._clock = clock
        self._wall_clock = wall_clock
        self._known = Memory[str, KeyRecord | None](_CAPACITY, memory_s, clock)

    async def __call__(self, caller: Caller) -> Caller:
        """The caller with its standing of now, and no tier above batch.

        Raises:
            RempartError: INVALID_API_KEY, the key was revoked or has expired, or the tenant is gone; UNAVAILABLE when
                Redis is needed and does not answer.
        """
        if is_key_id(caller.key_id):
            await self._check_key(caller)
        elif not await self._has_tenant(caller.tenant):
            raise RempartError(ErrorKind.INVALID_API_KEY, "The tenant of this batch does not exist any more.")
        standing = await self._standings.of(caller.tenant)
        return replace(caller, standing=replace(standing, max_tier=ServiceTier.BATCH))

    async def _check_key(self, caller: Caller) -> None:
        remembered = self._known.get(caller.key_id)
        if remembered is None:
            asked_at = self._clock()
            remembered = (await self._keys.find(caller.key_id),)
            self._known.put(caller.key_id, remembered[0], asked_at)
        (record,) = remembered
        if record is None or record.tenant != caller.tenant or 0 < record.expires_s <= self._wall_clock():
            raise RempartError(ErrorKind.INVALID_API_KEY, "The API key of this batch is no longer valid.")
