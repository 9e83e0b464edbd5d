"""The quota ledger: reserve the worst case before a request runs, settle what it used when it ends.

    reserve ─► admitted ─► lease, renewed while the request runs ─► settle: window corrected, usage added
       │                        └─► router gone: the lease ends by itself   └─► refund: as if never made
       └─► refused: nothing counted, the true wait told

Limits hold for any window of 60 seconds (a log of reservations, no buckets of time), across all routers of one Redis:
every transition is one Lua script that runs as a whole, by the server's clock. A reservation counts in the accounts of
its tenant, its model and its key (limits.py) and must fit all of them.

Budgets are of UTC days and months. What was settled in a day and what is in flight, at its worst case, never exceed the
day's budget. A request that runs over midnight is settled in the new day.
"""

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

from rempart_platform.bounds import require, require_positive
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.closing import Ending, EndingQueue
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.reservation import Balance, Reservation, ReserveReply
from rempart_platform.tenancy.terms import Terms

logger = logging.getLogger(__name__)

RESERVE = load_script("reserve")
SETTLE = load_script("settle", runs_when_memory_is_full=True)
REFUND = load_script("refund", runs_when_memory_is_full=True)
RENEW = load_script("renew", runs_when_memory_is_full=True)
SNAPSHOT = load_script("snapshot", runs_when_memory_is_full=True)

_MAX_RENEWALS_PER_SCRIPT = 500
_MAX_PLAN_CHANGES = 3


@dataclass(frozen=True, slots=True)
class QuotaConfig:
    """How quotas are counted. All routers of one Redis must agree on it."""

    default_limits: TenantLimits = field(default_factory=TenantLimits)
    """For what a tenant's own limits and its plan's leave unset; None is unlimited."""
    window_s: float = 60.0
    """The minute of requests and tokens per minute."""
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
    """That wait for Redis; beyond so many the oldest is given up and counted."""
    recount_s: float = 0.1
    """How often a grant counts its tenant's window anew, to prove that nothing is granted beyond a limit."""
    max_recounted: int = 1000
    """Reservations of a window that is counted anew; a longer one is not."""
    drain_s: float = 2.0
    """For how long endings that wait hold up a router that stops."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("cached_token_weight", "recount_s", "max_recounted", "drain_s"))
        require(self.ending_max_age_s < self.ending_memory_s, "ending_max_age_s", "less than ending_memory_s")
        require(self.cached_token_weight <= 1, "cached_token_weight", "between 0 and 1")


class LedgerObserver(Protocol):
    """What the ledger tells metrics."""

    def reserved(self, tenant: str) -> None: ...

    def refused(self, tenant: str, reason: str) -> None:
        """`reason`: "impossible", "unavailable", or the limit: "requests", "tokens", "concurrency" and so on."""

    def overgranted(self, tokens: int) -> None:
        """So many tokens were granted beyond a limit of tokens per minute, which must never be."""

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
        self._terms = Terms(redis, clock)
        self._clock = clock
        self._recount_at = clock()
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
        """Holds a place in flight and the worst case in tokens and money, all or nothing.

        Args:
            tenant: who asks.
            request_id: serves one reservation.
            tokens: the worst case, of which the prompt has `prompt_tokens`.
            model: its account counts too, and its price makes the worst case in money; "" for neither.
            key_id: its account counts too; "" for none.
            prompt_tokens: matter for money alone.

        Raises:
            RempartError: RATE_LIMIT_EXCEEDED with the true wait; INVALID_REQUEST when no wait would help;
                UNAVAILABLE when Redis does not answer.
        """
        asked = Reservation(request_id, tenant, tokens, model=model, key_id=key_id)
        try:
            asked = await self._at_price(asked, prompt_tokens)
            reply = await self._ask(asked)
        except RedisAwayError as error:
            if error.may_have_run:
                self.endings.put(self._refund_ending(asked))
            self._observer.refused(tenant, "unavailable")
            raise
        except asyncio.CancelledError:
            self.endings.put(self._refund_ending(asked))
            raise
        if reply.num_swept_leases:
            self._observer.leases_expired(reply.num_swept_leases)
        assert reply.outcome != "settled", "a request id serves one reservation"
        if not reply.is_admitted:
            self._observer.refused(tenant, reply.outcome)
            currency = (await self._terms.prices()).currency if reply.limit_name.startswith("money") else ""
            raise reply.refusal(asked, self._config.concurrency_retry_s, currency)
        reservation = replace(asked, headers=reply.headers())
        self._open[request_id] = reservation
        self._observer.reserved(tenant)
        if reply.excess:
            self._observer.overgranted(reply.excess)
            logger.error(
                "tokens were granted beyond a limit", extra={"fields": {"tenant": tenant, "excess": reply.excess}}
            )
        return reservation

    async def _at_price(self, asked: Reservation, prompt_tokens: int) -> Reservation:
        if not asked.model:
            return asked
        price = (await self._terms.prices()).of(asked.model)
        return replace(asked, price=price, money=price.worst_cost(asked.tokens, prompt_tokens))

    async def _ask(self, asked: Reservation) -> ReserveReply:
        """Runs the script with the limits of the plan that the tenant has."""
        for _ in range(_MAX_PLAN_CHANGES):
            plan = self._terms.plan_of(asked.tenant)
            limits = await self._terms.limits(plan)
            args: list[str | int] = [asked.reservation_id, asked.tokens, asked.money, self._window_us, self._lease_us]
            args += [plan, asked.model, asked.key_id]
            args += limits.own.inherit(self._config.default_limits).numbers()
            args += limits.of_model(asked.model).numbers()
            max_recounted = self._max_recounted()
            args.append(max_recounted)
            reply = ReserveReply.parse(await self._redis.run_script(RESERVE, _keys(asked), args))
            if max_recounted and not reply.is_admitted:
                self._recount_at = self._clock()  # nothing was counted: the next one may be
            if reply.outcome != "plan":
                return reply
            self._terms.has_plan(asked.tenant, reply.limit_name)
        raise RempartError(ErrorKind.UNAVAILABLE, "The tenant's plan is being changed.", retry_after_s=1.0)

    def _max_recounted(self) -> int:
        now = self._clock()
        if now < self._recount_at:
            return 0
        self._recount_at = now + self._config.recount_s
        return self._config.max_recounted

    async def settle(self, reservation: Reservation, usage: Usage, model: str) -> None:
        """Ends a reservation with what was used. Again is harmless; never raises because Redis is away."""
        counted = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
        counted += math.ceil(self._config.cached_token_weight * usage.cached_tokens)
        counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        cost = reservation.price.cost(usage)
        args: list[str | int] = [reservation.reservation_id, self._window_us, self._memory_us, counted, cost, model]
        args += counts
        names = ("ending", "reservation_id", "tenant", "model", "prompt_tokens", "completion_tokens", "cached_tokens")
        values = ("settle", reservation.reservation_id, reservation.tenant, model, *counts)
        ending = Ending(SETTLE, _keys(reservation), args, dict(zip(names, values, strict=True)))
        if await self._end(reservation, ending):
            self._observer.settled(reservation.tenant, model, usage)

    async def refund(self, reservation: Reservation) -> None:
        """Ends a reservation as if it had never been made. Again is harmless; never raises because Redis is away."""
        if await self._end(reservation, self._refund_ending(reservation)):
            self._observer.refunded(reservation.tenant)

    async def balance(self, tenant: str, *, model: str = "", key_id: str = "") -> Balance:
        """What counts now in the account of a model, of a key, or of the tenant when neither is given."""
        keys = TenantKeys(tenant).account(model, key_id)
        return Balance.parse(await self._redis.run_script(SNAPSHOT, keys, (self._window_us,)))

    async def renew_leases(self) -> None:
        """Renews what this router holds; called every third of a lease."""
        held_in: dict[tuple[str, ...], list[Reservation]] = defaultdict(list)
        for reservation in self._open.values():
            held_in[_keys(reservation)].append(reservation)
        for keys, held in held_in.items():
            for start in range(0, len(held), _MAX_RENEWALS_PER_SCRIPT):
                args: list[str | int] = [self._lease_us]
                for each in held[start : start + _MAX_RENEWALS_PER_SCRIPT]:
                    args += (each.reservation_id, each.tokens, each.money)
                await self._redis.run_script(RENEW, keys, args)

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
        return Ending(REFUND, _keys(reservation), args, fields)

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


def _keys(reservation: Reservation) -> tuple[str, ...]:
    """KEYS of the scripts: all accounts in which it counts."""
    return _keys_of(reservation.tenant, reservation.model, reservation.key_id)


@lru_cache(maxsize=1024)
def _keys_of(tenant: str, model: str, key_id: str) -> tuple[str, ...]:
    """A request needs these two dozen names when it comes, when it ends, and at each renewal between."""
    return TenantKeys(tenant).ledger_of(model, key_id)


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
