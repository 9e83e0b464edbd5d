"""The quota ledger: reserve the worst case before a request runs, settle what it used when it ends.

    reserve ─► admitted ─► lease, renewed while the request runs ─► settle: window corrected, usage added
       │                        └─► router gone: the lease ends by itself   └─► refund: as if never made
       └─► refused: nothing counted, the true wait told

Limits hold for any window of 60 seconds (a log of reservations, no buckets of time), across all routers of one Redis:
every transition is one Lua script that runs as a whole, by the server's clock.
"""

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rempart_platform.generation import Usage
from rempart_platform.tenancy.closing import Ending, EndingQueue
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.reservation import Reservation, ReserveReply, Snapshot
from rempart_platform.tenancy.tenants import TenantLimits

logger = logging.getLogger(__name__)

RESERVE = load_script("reserve")
SETTLE = load_script("settle", runs_when_memory_is_full=True)
REFUND = load_script("refund", runs_when_memory_is_full=True)
RENEW = load_script("renew", runs_when_memory_is_full=True)
SNAPSHOT = load_script("snapshot", runs_when_memory_is_full=True)

_MAX_RENEWALS_PER_SCRIPT = 500


@dataclass(frozen=True, slots=True)
class QuotaConfig:
    """How quotas are counted. All routers of one Redis must agree on it."""

    default_limits: TenantLimits = field(default_factory=TenantLimits)
    """For what a tenant's own limits leave unset; None is unlimited."""
    window_s: float = 60.0
    lease_s: float = 10.0
    """How long a crashed router's requests stay in flight. Renewed every third of it."""
    concurrency_retry_s: float = 1.0
    """The wait that is told when only concurrency refuses."""
    cached_token_weight: float = 1.0
    """What a prompt token from the prefix cache counts in tokens per minute: 1.0 as any other, 0.0 nothing."""
    ending_memory_s: float = 900.0
    """For how long Redis knows that a reservation has ended."""
    ending_max_age_s: float = 600.0
    """For how long an ending is brought again while Redis is away; less than `ending_memory_s`."""
    max_waiting_endings: int = 10_000
    drain_s: float = 2.0
    """For how long endings that wait hold up a router that stops."""

    def __post_init__(self) -> None:
        if not self.ending_max_age_s < self.ending_memory_s:
            raise ValueError("ending_max_age_s must be less than ending_memory_s")
        if not 0.0 <= self.cached_token_weight <= 1.0:
            raise ValueError("cached_token_weight must be between 0 and 1")


class LedgerObserver(Protocol):
    """What the ledger tells metrics."""

    def reserved(self, tenant: str) -> None: ...

    def refused(self, tenant: str, reason: str) -> None:
        """`reason`: "requests", "tokens", "concurrency", "impossible" or "unavailable"."""

    def settled(self, tenant: str, model: str, usage: Usage) -> None: ...

    def refunded(self, tenant: str) -> None: ...

    def ending_deferred(self) -> None:
        """Redis was away at the end of a request; the ending will be brought later."""

    def ending_lost(self) -> None:
        """An ending could not be brought: usage is missing."""

    def leases_expired(self, count: int) -> None:
        """Requests of a router that is gone were taken out of flight."""


class Ledger:
    """Reservations of this router; made by `open_ledger`, which also keeps their leases alive."""

    def __init__(
        self, redis: RedisClient, config: QuotaConfig, observer: LedgerObserver, clock: Callable[[], float]
    ) -> None:
        self._redis = redis
        self._config = config
        self._observer = observer
        self._window_us = _microseconds(config.window_s)
        self._lease_us = _microseconds(config.lease_s)
        self._memory_us = _microseconds(config.ending_memory_s)
        self._open: dict[str, Reservation] = {}
        self.endings = EndingQueue(
            redis,
            capacity=config.max_waiting_endings,
            max_age_s=config.ending_max_age_s,
            clock=clock,
            on_lost=observer.ending_lost,
        )

    @property
    def num_open(self) -> int:
        """Reservations of this router that are neither settled nor refunded."""
        return len(self._open)

    async def reserve(
        self, tenant: str, request_id: str, tokens: int, *, model: str = "", key_id: str = "", prompt_tokens: int = 0
    ) -> Reservation:
        """Holds a place in flight and the worst case in tokens, all or nothing.

        Raises:
            RempartError: RATE_LIMIT_EXCEEDED with the true wait; INVALID_REQUEST when no wait would help;
                UNAVAILABLE when Redis does not answer.
        """
        default = self._config.default_limits
        args: list[str | int] = [request_id, tokens, self._window_us, self._lease_us]
        args += [default.requests_per_minute or 0, default.tokens_per_minute or 0, default.concurrency or 0]
        may_be_made = self._refund_ending(Reservation(request_id, tenant, tokens))
        try:
            raw_reply = await self._redis.run_script(RESERVE, TenantKeys(tenant).ledger, args)
        except RedisAwayError as error:
            if error.may_have_run:
                self.endings.put(may_be_made)
            self._observer.refused(tenant, "unavailable")
            raise
        except asyncio.CancelledError:
            self.endings.put(may_be_made)
            raise
        reply = ReserveReply.parse(raw_reply)
        if reply.num_swept_leases:
            self._observer.leases_expired(reply.num_swept_leases)
        assert reply.outcome != "settled", "a request id serves one reservation"
        if not reply.is_admitted:
            self._observer.refused(tenant, reply.outcome)
            raise reply.refusal(tenant, tokens, self._config.concurrency_retry_s)
        reservation = Reservation(request_id, tenant, tokens, reply.headers())
        self._open[request_id] = reservation
        self._observer.reserved(tenant)
        return reservation

    async def settle(self, reservation: Reservation, usage: Usage, model: str) -> None:
        """Ends a reservation with what was used. Again is harmless; never raises because Redis is away."""
        counted = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
        counted += math.ceil(self._config.cached_token_weight * usage.cached_tokens)
        counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        args: list[str | int] = [reservation.reservation_id, self._window_us, self._memory_us, counted, model, *counts]
        names = ("ending", "reservation_id", "tenant", "model", "prompt_tokens", "completion_tokens", "cached_tokens")
        values = ("settle", reservation.reservation_id, reservation.tenant, model, *counts)
        ending = Ending(SETTLE, TenantKeys(reservation.tenant).ledger, args, dict(zip(names, values, strict=True)))
        if await self._end(reservation, ending):
            self._observer.settled(reservation.tenant, model, usage)

    async def refund(self, reservation: Reservation) -> None:
        """Ends a reservation as if it had never been made. Again is harmless; never raises because Redis is away."""
        if await self._end(reservation, self._refund_ending(reservation)):
            self._observer.refunded(reservation.tenant)

    async def snapshot(self, tenant: str) -> Snapshot:
        """What counts for a tenant now, of all routers."""
        reply = await self._redis.run_script(SNAPSHOT, TenantKeys(tenant).ledger, (self._window_us,))
        requests, tokens, concurrency, _ = (int(number or 0) for number in reply)
        return Snapshot(requests, tokens, concurrency)

    async def renew_leases(self) -> None:
        """Renews what this router holds; called every third of a lease."""
        ids_of: dict[str, list[str]] = defaultdict(list)
        for reservation in self._open.values():
            ids_of[reservation.tenant].append(reservation.reservation_id)
        for tenant, ids in ids_of.items():
            for start in range(0, len(ids), _MAX_RENEWALS_PER_SCRIPT):
                args: list[str | int] = [self._lease_us, *ids[start : start + _MAX_RENEWALS_PER_SCRIPT]]
                await self._redis.run_script(RENEW, TenantKeys(tenant).ledger, args)

    async def keep_leases(self) -> None:
        """Renews leases until cancelled."""
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            try:
                await self.renew_leases()
            except RedisAwayError:
                # The next round gives back what expires meanwhile.
                logger.warning("leases could not be renewed", extra={"fields": {"num_open": self.num_open}})

    def _refund_ending(self, reservation: Reservation) -> Ending:
        args = (reservation.reservation_id, self._window_us, self._memory_us)
        fields = {"ending": "refund", "reservation_id": reservation.reservation_id, "tenant": reservation.tenant}
        return Ending(REFUND, TenantKeys(reservation.tenant).ledger, args, fields)

    async def _end(self, reservation: Reservation, ending: Ending) -> bool:
        """True for the first ending of a reservation of this router."""
        is_first = self._open.pop(reservation.reservation_id, None) is not None
        try:
            await self._redis.run_script(ending.script, ending.keys, ending.args)
        except RedisAwayError:
            self._defer(ending)
        except asyncio.CancelledError:
            self._defer(ending)
            raise
        return is_first

    def _defer(self, ending: Ending) -> None:
        self.endings.put(ending)
        self._observer.ending_deferred()


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


@asynccontextmanager
async def open_ledger(
    redis: RedisClient,
    config: QuotaConfig,
    observer: LedgerObserver,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Ledger]:
    """A ledger with its two tasks: one renews leases, one brings endings that Redis could not take at once."""
    ledger = Ledger(redis, config, observer, clock)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ledger.keep_leases()), tasks.create_task(ledger.endings.run())]
        try:
            yield ledger
        finally:
            await ledger.endings.drain(config.drain_s)
            for task in running:
                task.cancel()
