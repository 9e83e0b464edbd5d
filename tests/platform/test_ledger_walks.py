"""Random histories of three routers that reserve, settle, refund, crash, come back and repeat themselves on one Redis.

An auditor reads every script's reply, with the server's time in it, and keeps books of its own. Each answer must be the
one that the books give, and at no moment may more be granted than a limit allows.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from rempart_platform.errors import RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.limits import LIMITS, LimitChange, TenantLimits
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import ModelPrice, PriceRegistry
from rempart_platform.tenancy.quota import RESERVE, SETTLE, Ledger, QuotaConfig
from rempart_platform.tenancy.redis_client import RedisClient, ScriptReply, connect_redis
from rempart_platform.tenancy.reservation import Balance, Reservation, ReserveReply
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import RecordingObserver, patient
from rempart_platform.tenancy.usage import UsageReader

WINDOW_S, LEASE_S = 0.06, 0.02
MODELS, KEYS = ("model one", "two"), ("key-1", "key-2")
PRICES = {"model one": ModelPrice(input=3, cached=1, output=5), "two": ModelPrice()}
NAME_OF = {"requests": "requests_per_minute", "tokens": "tokens_per_minute"}


@dataclass
class Lease:
    end_us: int
    tokens: int
    money: int
    has_returned: bool = False
    """It had ended, its room was given to others, and then its router came back."""


@dataclass
class Account:
    """The books of one account, by lists that are searched from end to end."""

    limits: dict[str, int]
    window: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Request id → time of admission and tokens."""
    leases: dict[str, Lease] = field(default_factory=dict)
    settled: dict[str, tuple[int, int]] = field(default_factory=lambda: defaultdict(lambda: (0, 0)))
    """Day or month → tokens and money."""
    unheld: dict[str, tuple[int, int]] = field(default_factory=lambda: defaultdict(lambda: (0, 0)))
    """The part of it that was settled when its lease had ended before."""

    def at(self, now_us: int) -> None:
        self.window = {each: entry for each, entry in self.window.items() if entry[0] + WINDOW_S * 1e6 > now_us}
        self.leases = {each: lease for each, lease in self.leases.items() if lease.end_us > now_us}

    def in_the_way(self, tokens: int, money: int, now_us: int) -> set[str]:
        """Limits that a further request would exceed."""
        day, month = _periods(now_us)
        held_tokens = sum(lease.tokens for lease in self.leases.values())
        held_money = sum(lease.money for lease in self.leases.values())
        would_be = {
            "requests_per_minute": len(self.window) + 1,
            "tokens_per_minute": sum(entry[1] for entry in self.window.values()) + tokens,
            "concurrency": len(self.leases) + 1,
            "concurrent_tokens": held_tokens + tokens,
            "tokens_per_day": self.settled[day][0] + held_tokens + tokens,
            "tokens_per_month": self.settled[month][0] + held_tokens + tokens,
            "money_per_day": self.settled[day][1] + held_money + money,
            "money_per_month": self.settled[month][1] + held_money + money,
        }
        return {name for name, amount in would_be.items() if 0 < self.limits[name] < amount}

    def exceeded(self, now_us: int) -> set[str]:
        """Limits beyond which something is granted; must be none."""
        day, month = _periods(now_us)
        leases = [lease for lease in self.leases.values() if not lease.has_returned]
        held_tokens, held_money = sum(lease.tokens for lease in leases), sum(lease.money for lease in leases)
        granted = {
            "requests_per_minute": len(self.window),
            "tokens_per_minute": sum(entry[1] for entry in self.window.values()),
            "concurrency": len(leases),
            "concurrent_tokens": held_tokens,
            "tokens_per_day": self.settled[day][0] - self.unheld[day][0] + held_tokens,
            "tokens_per_month": self.settled[month][0] - self.unheld[month][0] + held_tokens,
            "money_per_day": self.settled[day][1] - self.unheld[day][1] + held_money,
            "money_per_month": self.settled[month][1] - self.unheld[month][1] + held_money,
        }
        return {name for name, amount in granted.items() if 0 < self.limits[name] < amount}

    def end(self, request_id: str, used: tuple[int, int] | None, now_us: int) -> None:
        """Settles with tokens and money that were used, refunds with None."""
        lease = self.leases.pop(request_id, None)
        entry = self.window.pop(request_id, None)
        if used is None:
            return
        if entry is not None:
            self.window[request_id] = (entry[0], used[0])
        for period in _periods(now_us):
            self.settled[period] = _sum(self.settled[period], used)
            if lease is None or lease.has_returned:
                self.unheld[period] = _sum(self.unheld[period], used)


class Auditor:
    """Checks replies against the books of every account of one tenant, by KEYS of the scripts."""

    def __init__(self, limits: dict[str, dict[str, int]]) -> None:
        self.accounts = {name: Account(of_account) for name, of_account in limits.items()}
        self.ended: set[str] = set()
        self.num_checked = 0
        self.outcomes: dict[str, int] = defaultdict(int)

    def check(self, script: Script, keys: Sequence[str], args: Sequence[str | int | float], reply: ScriptReply) -> None:
        now_us = time_of(script, reply)
        names = [key.rpartition("}:window")[2] for key in keys if "}:window" in key]
        accounts = [self.accounts[name] for name in names]
        for account in accounts:
            account.at(now_us)
        match script.name:
            case "reserve":
                self._reserve(ReserveReply.parse(reply), accounts, args, now_us)
            case "settle" | "refund":
                request_id = str(args[0])
                used = (int(args[3]), int(args[4])) if script is SETTLE else None
                assert reply[0] == (request_id not in self.ended)
                if request_id not in self.ended:
                    for account in accounts:
                        account.end(request_id, used, now_us)
                self.ended.add(request_id)
            case "renew":
                self._renew(accounts, args, now_us)
            case "snapshot":
                _check_balance(Balance.parse(reply), accounts[0], now_us)
            case other:
                raise AssertionError(other)
        for name, account in zip(names, accounts, strict=True):
            assert account.exceeded(now_us) == set(), f"granted too much in account {name!r}"
        self.num_checked += 1

    def _reserve(
        self, reply: ReserveReply, accounts: list[Account], args: Sequence[str | int | float], now_us: int
    ) -> None:
        if reply.outcome == "plan":
            return
        request_id, tokens, money = str(args[0]), int(args[1]), int(args[2])
        self.outcomes[reply.outcome] += 1
        if request_id in self.ended:
            assert reply.outcome == "settled"
            return
        if request_id in accounts[0].window or request_id in accounts[0].leases:
            assert reply.outcome == "admitted", "a repetition"
            return
        if any(_is_impossible(account.limits, tokens, money) for account in accounts):
            assert reply.outcome == "impossible"
            return
        names = ("tenant", *(("model",) if args[6] else ()), *(("key",) if args[7] else ()))
        reasons = {
            (name, limit)
            for name, account in zip(names, accounts, strict=True)
            for limit in account.in_the_way(tokens, money, now_us)
        }
        if reply.is_admitted:
            assert reasons == set()
            for account in accounts:
                account.window[request_id] = (now_us, tokens)
                account.leases[request_id] = Lease(now_us + round(LEASE_S * 1e6), tokens, money)
        else:
            assert (reply.account, NAME_OF.get(reply.outcome, reply.outcome)) in reasons

    def _renew(self, accounts: list[Account], args: Sequence[str | int | float], now_us: int) -> None:
        for request_id, tokens, money in zip(args[1::3], args[2::3], args[3::3], strict=True):
            for account in accounts if request_id not in self.ended else ():
                lease = account.leases.setdefault(str(request_id), Lease(0, int(tokens), int(money), has_returned=True))
                lease.end_us = now_us + round(LEASE_S * 1e6)


class Tap(RedisClient):
    """Passes everything on and keeps what scripts were asked and answered."""

    def __init__(self, redis: RedisClient) -> None:
        self._inner = redis
        self.heard: list[tuple[Script, Sequence[str], Sequence[str | int | float], ScriptReply]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def read_hash(self, key: str) -> dict[str, str]:
        return await self._inner.read_hash(key)

    async def run_script(self, script: Script, keys: Sequence[str], args: Sequence[str | int | float]) -> ScriptReply:
        reply = await self._inner.run_script(script, keys, args)
        self.heard.append((script, tuple(keys), tuple(args), reply))
        return reply


@dataclass(frozen=True)
class Act:
    """What one router does next; `pick` chooses among what there is."""

    kind: str
    router: int
    pick: int
    tokens: int
    model: str
    key_id: str


ACTS = st.builds(
    Act,
    kind=st.sampled_from(
        ("reserve",) * 8 + ("settle",) * 5 + ("refund", "renew", "renew", "repeat", "crash", "return")
    ),
    router=st.integers(0, 2),
    pick=st.integers(0, 1000),
    tokens=st.sampled_from((0, 10, 20, 20, 30, 50)),
    model=st.sampled_from(("", *MODELS)),
    key_id=st.sampled_from(("", *KEYS)),
)
# Amounts are tens, so that sums often meet a limit exactly.
LIMIT_VALUES = st.fixed_dictionaries(
    {
        "requests_per_minute": st.sampled_from((0, 4, 20)),
        "tokens_per_minute": st.sampled_from((0, 100, 400)),
        "concurrency": st.sampled_from((0, 2, 8)),
        "concurrent_tokens": st.sampled_from((0, 60, 200)),
        "tokens_per_day": st.sampled_from((0, 300, 2000)),
        "tokens_per_month": st.sampled_from((0, 0, 1000)),
        "money_per_day": st.sampled_from((0, 800, 5000)),
        "money_per_month": st.sampled_from((0, 0, 3000)),
    }
)
NARROW = st.dictionaries(st.sampled_from(LIMITS), st.sampled_from((0, 3, 50, 150)), max_size=3)


SETTINGS = settings(
    max_examples=10,
    stateful_step_count=8,
    deadline=None,
    # Time is the server's, so an example can only nearly be repeated, and is not shrunk.
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
    database=None,
)


class Walk:
    """Three routers on one Redis, and those that crashed but may come back."""

    def __init__(self, runner: asyncio.Runner, clients: Sequence[RedisClient]) -> None:
        self.runner = runner
        self.taps = [Tap(client) for client in clients]
        self.num_tenants = 0
        self.num_acts = 0
        self.outcomes: dict[str, int] = defaultdict(int)
        self.finding: AssertionError | None = None
        """The first; what Hypothesis says when a history cannot be repeated to the microsecond would hide it."""


class LedgerWalks(RuleBasedStateMachine):
    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self._walk = walk
        walk.num_tenants += 1
        for tap in walk.taps:
            tap.heard.clear()
        self._tenant = f"tenant-{walk.num_tenants}"
        self._observer = RecordingObserver()
        self._num_requests = 0
        self._asked: list[tuple[Script, Sequence[str], Sequence[str | int | float]]] = []
        self._routers = [self._router(number) for number in range(3)]
        self._crashed: list[Ledger] = []
        self._open: dict[int, list[Reservation]] = defaultdict(list)
        """By id() of the ledger."""

    def _router(self, number: int) -> Ledger:
        config = QuotaConfig(window_s=WINDOW_S, lease_s=LEASE_S, cached_token_weight=0.5)
        return Ledger(self._walk.taps[number], config, self._observer, time.monotonic)

    @initialize(
        plan=LIMIT_VALUES, tenant=NARROW, plan_model=NARROW, tenant_model=NARROW, key=NARROW, has_plan=st.booleans()
    )
    def begin(
        self,
        plan: dict[str, int],
        tenant: dict[str, int],
        plan_model: dict[str, int],
        tenant_model: dict[str, int],
        key: dict[str, int],
        has_plan: bool,
    ) -> None:
        self._walk.runner.run(self._store(plan, tenant, plan_model, tenant_model, key, has_plan))
        none = dict.fromkeys(LIMITS, 0)
        self._auditor = Auditor(
            {
                "": {**none, **(plan if has_plan else {}), **tenant},
                f":model:{MODELS[0]}": {**none, **(plan_model if has_plan else {}), **tenant_model},
                f":model:{MODELS[1]}": none,
                f":key:{KEYS[0]}": {**none, **key},
                f":key:{KEYS[1]}": none,
            }
        )

    async def _store(
        self,
        plan: dict[str, int],
        tenant: dict[str, int],
        plan_model: dict[str, int],
        tenant_model: dict[str, int],
        key: dict[str, int],
        has_plan: bool,
    ) -> None:
        redis = self._walk.taps[0]._inner
        plan_name = f"plan-of-{self._tenant}" if has_plan else ""
        if has_plan:
            changes = (LimitChange(TenantLimits(**plan)), LimitChange(TenantLimits(**plan_model), model=MODELS[0]))
            await PlanRegistry(redis).set(plan_name, *changes)
        tenants = TenantRegistry(redis)
        await tenants.create(self._tenant, TenantLimits(**tenant), plan_name)
        await tenants.change(self._tenant, LimitChange(TenantLimits(**tenant_model), model=MODELS[0]))
        await tenants.change(self._tenant, LimitChange(TenantLimits(**key), key_id=KEYS[0]))

    @rule(acts=st.lists(ACTS, min_size=10, max_size=40), at_once=st.booleans())
    def act(self, acts: list[Act], at_once: bool) -> None:
        if at_once:
            self._do_all([[act for act in acts if act.router == router] for router in range(3)])
        else:
            self._do_all([acts])

    @rule(leases=st.sampled_from((0.1, 0.4, 1.2, 3.5)))
    def time_passes(self, leases: float) -> None:
        """Routers that have not crashed renew, as they do, every third of a lease."""
        ends_at = time.monotonic() + leases * LEASE_S
        while (left_s := ends_at - time.monotonic()) > 0:
            time.sleep(min(left_s, LEASE_S / 3))
            self._do_all([[Act("renew", router, 0, 0, "", "") for router in range(3)]])

    def _do_all(self, lines: list[list[Act]]) -> None:
        """Each line one act after the other, all lines at once."""

        async def do_line(acts: list[Act]) -> None:
            for act in acts:
                await self._do(act)

        async def do_lines() -> None:
            await asyncio.gather(*(do_line(acts) for acts in lines))

        self._walk.runner.run(do_lines())
        self._walk.num_acts += sum(map(len, lines))
        self._audit()

    def _audit(self) -> None:
        heard = [each for tap in self._walk.taps for each in tap.heard]
        for tap in self._walk.taps:
            tap.heard.clear()
        for script, keys, args, reply in sorted(heard, key=lambda each: time_of(each[0], each[3])):
            try:
                self._auditor.check(script, keys, args, reply)
            except AssertionError as error:
                self._walk.finding = self._walk.finding or error
                raise
            self._asked.append((script, keys, args))

    async def _do(self, act: Act) -> None:
        ledger = self._routers[act.router]
        match act.kind:
            case "reserve":
                await self._reserve(ledger, act)
            case "settle" | "refund":
                await self._end(ledger, act)
            case "renew":
                await ledger.renew_leases()
            case "repeat" if self._asked:
                await self._walk.taps[act.router].run_script(*self._asked[act.pick % len(self._asked)])
            case "crash" if act.pick % 4 == 0:
                self._crashed.append(ledger)
                self._routers[act.router] = self._router(act.router)
            case "return" if self._crashed:
                returned = self._crashed[act.pick % len(self._crashed)]
                if act.pick % 2:
                    await returned.renew_leases()
                else:
                    await self._end(returned, act)

    async def _reserve(self, ledger: Ledger, act: Act) -> None:
        self._num_requests += 1
        with suppress(RempartError):
            reservation = await ledger.reserve(
                self._tenant,
                f"request {self._num_requests}",
                act.tokens,
                model=act.model,
                key_id=act.key_id,
                prompt_tokens=act.tokens // 2,
            )
            self._open[id(ledger)].append(reservation)

    async def _end(self, ledger: Ledger, act: Act) -> None:
        mine = self._open[id(ledger)]
        if not mine:
            return
        # Now and then one that has ended already.
        reservation = mine[act.pick % len(mine)] if act.pick % 5 == 0 else mine.pop(act.pick % len(mine))
        if act.kind == "refund":
            await ledger.refund(reservation)
        else:
            prompt = reservation.tokens // 2
            completion = min(act.tokens, reservation.tokens - prompt)
            await ledger.settle(reservation, Usage(prompt, completion, cached_tokens=prompt // 3), act.model)

    def teardown(self) -> None:
        """When all have ended or crashed, nothing is held; and what was settled is what is charged."""
        if self._num_requests == 0:
            return
        self._walk.runner.run(self._end_living())
        time.sleep(max(WINDOW_S, LEASE_S) + 0.002)
        balance = self._walk.runner.run(self._read_balances())
        self._audit()
        for name, found in balance.items():
            in_flight = (found.requests, found.tokens, found.concurrency, found.held_tokens, found.held_money)
            assert in_flight == (0, 0, 0, 0, 0), name
        settled = self._auditor.accounts[""].settled
        cost = sum(money for period, (_, money) in settled.items() if len(period) == len("2026-11-25"))
        assert self._walk.runner.run(self._read_cost()) == cost
        for outcome, count in self._auditor.outcomes.items():
            self._walk.outcomes[outcome] += count

    async def _end_living(self) -> None:
        for ledger in self._routers:
            for number, reservation in enumerate(self._open[id(ledger)]):
                if number % 2:
                    await ledger.refund(reservation)
                else:
                    await ledger.settle(reservation, Usage(reservation.tokens // 2, 0), "model one")
        assert sum(ledger.num_open for ledger in self._routers) == 0

    async def _read_balances(self) -> dict[str, Balance]:
        ledger = self._routers[0]
        balances = {"": await ledger.balance(self._tenant)}
        for model in MODELS:
            balances[model] = await ledger.balance(self._tenant, model=model)
        for key_id in KEYS:
            balances[key_id] = await ledger.balance(self._tenant, key_id=key_id)
        return balances

    async def _read_cost(self) -> int:
        redis = self._walk.taps[0]._inner
        records = await UsageReader(redis, TenantRegistry(redis)).read(self._tenant)
        return sum(record.cost_nanos for record in records)


def _check_balance(found: Balance, account: Account, now_us: int) -> None:
    day, month = _periods(now_us)
    assert found == Balance(
        requests=len(account.window),
        tokens=sum(entry[1] for entry in account.window.values()),
        concurrency=len(account.leases),
        held_tokens=sum(lease.tokens for lease in account.leases.values()),
        held_money=sum(lease.money for lease in account.leases.values()),
        tokens_per_day=account.settled[day][0],
        money_per_day=account.settled[day][1],
        tokens_per_month=account.settled[month][0],
        money_per_month=account.settled[month][1],
    )


def _is_impossible(limits: dict[str, int], tokens: int, money: int) -> bool:
    needs = {name: money if name.startswith("money") else tokens for name in LIMITS if name != "concurrency"}
    needs["requests_per_minute"] = 1
    return any(0 < limits[name] < need for name, need in needs.items())


def _periods(now_us: int) -> tuple[str, str]:
    day = str(datetime.fromtimestamp(now_us / 1e6, UTC).date())
    return day, day[:7]


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def time_of(script: Script, reply: ScriptReply) -> int:
    now_us = reply[2] if script is RESERVE else reply[-1]
    assert isinstance(now_us, int)
    return now_us


@contextmanager
def three_clients() -> Iterator[Walk]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        server = runner.run(stack.enter_async_context(embedded_redis(EmbeddedRedisConfig())))
        clients = [runner.run(stack.enter_async_context(connect_redis(patient(server.url)))) for _ in range(3)]
        for model, price in PRICES.items():
            runner.run(PriceRegistry(clients[0]).set_price(model, price))
        try:
            yield Walk(runner, clients)
        finally:
            runner.run(stack.aclose())


def walk_for(num_acts: int) -> Walk:
    with three_clients() as walk:

        class Machine(LedgerWalks):
            def __init__(self) -> None:
                super().__init__(walk)

        try:
            while walk.num_acts < num_acts:
                run_state_machine_as_test(Machine, settings=SETTINGS)
        except Exception:
            if walk.finding is not None:
                raise walk.finding from None
            raise
    return walk


def test_nothing_is_granted_beyond_a_limit_in_two_thousand_acts() -> None:
    assert {"admitted", "settled", "impossible"} < set(walk_for(2_000).outcomes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_granted_beyond_a_limit_in_a_hundred_thousand_acts() -> None:
    outcomes = walk_for(100_000).outcomes
    refusals = {*LIMITS, "requests", "tokens"} - set(NAME_OF.values())
    assert {"admitted", "settled", "impossible", *refusals} == set(outcomes), "every answer was met"
