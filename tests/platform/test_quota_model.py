"""The ledger's scripts against a slow model of what they promise, over random histories."""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.crc import key_slot

from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.quota import REFUND, RENEW, RESERVE, SETTLE, SNAPSHOT
from rempart_platform.tenancy.redis_client import RedisClient, ScriptReply
from rempart_platform.tenancy.reservation import ReserveReply
from rempart_platform.tenancy.testing import own_redis

WINDOW_US, LEASE_US, MEMORY_US = 20_000, 8_000, 900_000_000
UNLIMITED: tuple[str | int, ...] = ("", "", "", *[0] * 16)
"""No plan, no model, no key, and nothing inherited."""


@dataclass
class Entry:
    request_id: str
    admitted_us: int
    tokens: int


@dataclass
class SlowLedger:
    """What a tenant holds, by lists that are searched from end to end."""

    max_requests: int = 0
    max_tokens: int = 0
    max_concurrency: int = 0
    entries: list[Entry] = field(default_factory=list)
    lease_ends: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def at(self, now_us: int) -> None:
        self.entries = [entry for entry in self.entries if entry.admitted_us + WINDOW_US > now_us]
        self.lease_ends = {each: end for each, end in self.lease_ends.items() if end > now_us}

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.entries)

    def reserve(self, request_id: str, tokens: int, now_us: int) -> tuple[str, int]:
        """Outcome and wait."""
        self.at(now_us)
        if self.max_tokens and tokens > self.max_tokens:
            return "impossible", 0
        waits = {
            "requests": self._wait(now_us, lambda left: bool(self.max_requests) and len(left) >= self.max_requests),
            "tokens": self._wait(
                now_us,
                lambda left: bool(self.max_tokens) and sum(entry.tokens for entry in left) + tokens > self.max_tokens,
            ),
        }
        outcome = max(waits, key=lambda limit: waits[limit])
        if waits[outcome] > 0:
            return outcome, waits[outcome]
        if self.max_concurrency and len(self.lease_ends) >= self.max_concurrency:
            return "concurrency", 0
        self.entries.append(Entry(request_id, now_us, tokens))
        self.lease_ends[request_id] = now_us + LEASE_US
        return "admitted", 0

    def _wait(self, now_us: int, is_refused: Callable[[list[Entry]], bool]) -> int:
        left = sorted(self.entries, key=lambda entry: entry.admitted_us)
        wait_us = 0
        while is_refused(left):
            wait_us = left.pop(0).admitted_us + WINDOW_US - now_us
        return wait_us

    def end(self, request_id: str, used: int | None, now_us: int) -> int:
        """Settles with what was used, refunds with None. 1 for the first ending."""
        self.at(now_us)
        if request_id in self.ended:
            return 0
        self.ended.add(request_id)
        self.lease_ends.pop(request_id, None)
        for entry in self.entries:
            if entry.request_id == request_id and used is not None:
                entry.tokens = used
        if used is None:
            self.entries = [entry for entry in self.entries if entry.request_id != request_id]
        return 1

    def renew(self, request_ids: Sequence[str], now_us: int) -> int:
        living = [each for each in request_ids if each not in self.ended]
        self.lease_ends.update({each: now_us + LEASE_US for each in living})
        return len(living)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, redis: RedisClient) -> None:
        super().__init__()
        self._runner = runner
        self._redis = redis
        self._keys = TenantKeys("acme")
        self._model = SlowLedger()
        self._ids: list[str] = []
        self._tokens_of: dict[str, int] = {}
        self._runner.run(redis.call(lambda each: each.flushall()))

    def _run(self, script: Script, *args: str | int) -> ScriptReply:
        return self._runner.run(self._redis.run_script(script, self._keys.ledger_of(), args))

    # Tokens are tens, so that sums often meet a limit exactly.
    @rule(requests=st.integers(0, 5), tokens=st.sampled_from((0, 20, 30, 60)), concurrency=st.integers(0, 4))
    def set_limits(self, requests: int, tokens: int, concurrency: int) -> None:
        limits = {"requests_per_minute": requests, "tokens_per_minute": tokens, "concurrency": concurrency}
        self._runner.run(self._redis.write_hash(self._keys.tenant, limits))
        self._model.max_requests, self._model.max_tokens = requests, tokens
        self._model.max_concurrency = concurrency

    @rule(tokens=st.sampled_from((0, 10, 20, 30)))
    def reserve(self, tokens: int) -> None:
        request_id = f"request {len(self._ids)}"
        self._ids.append(request_id)
        self._tokens_of[request_id] = tokens
        reply = ReserveReply.parse(self._run(RESERVE, request_id, tokens, 0, WINDOW_US, LEASE_US, *UNLIMITED))
        assert (reply.outcome, reply.wait_us) == self._model.reserve(request_id, tokens, reply.now_us)
        assert (reply.num_requests, reply.num_tokens) == (len(self._model.entries), self._model.tokens)

    @rule(pick=st.integers(0, 100), used=st.sampled_from((0, 10, 40)))
    def settle(self, pick: int, used: int) -> None:
        if self._ids:
            request_id = self._ids[pick % len(self._ids)]
            is_first, now_us = self._run(SETTLE, request_id, WINDOW_US, MEMORY_US, used, 0, "model", used, 0, 0)
            assert is_first == self._model.end(request_id, used, _integer(now_us))

    @rule(pick=st.integers(0, 100))
    def refund(self, pick: int) -> None:
        if self._ids:
            request_id = self._ids[pick % len(self._ids)]
            is_first, now_us = self._run(REFUND, request_id, WINDOW_US, MEMORY_US)
            assert is_first == self._model.end(request_id, None, _integer(now_us))

    @rule(count=st.integers(1, 5))
    def renew(self, count: int) -> None:
        renewed = [part for each in self._ids[-count:] for part in (each, self._tokens_of[each], 0)]
        num_renewed, now_us = self._run(RENEW, LEASE_US, *renewed)
        self._model.at(_integer(now_us))
        assert num_renewed == self._model.renew(self._ids[-count:], _integer(now_us))

    @rule(milliseconds=st.sampled_from((1, 3, 8, 21)))
    def time_passes(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)

    @invariant()
    def counts_agree(self) -> None:
        *counts, now_us = self._run(SNAPSHOT, WINDOW_US)
        self._model.at(_integer(now_us))
        assert counts[:3] == [len(self._model.entries), self._model.tokens, len(self._model.lease_ends)]


def _integer(value: str | int | None) -> int:
    assert isinstance(value, int)
    return value


def test_scripts_do_what_the_model_does() -> None:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        redis = runner.run(stack.enter_async_context(own_redis()))

        class Machine(LedgerMachine):
            def __init__(self) -> None:
                super().__init__(runner, redis)

        try:
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=60,
                    stateful_step_count=40,
                    deadline=None,
                    # Time is the server's, so an example can only nearly be repeated.
                    suppress_health_check=list(HealthCheck),
                    database=None,
                ),
            )
        finally:
            runner.run(stack.aclose())


def test_keys_of_each_script_lie_in_one_slot_of_a_cluster() -> None:
    slots = set()
    for name in ("a", "acme", "a" * 63, "z-9"):
        keys = TenantKeys(name)
        of_tenant = {key_slot(key.encode()) for key in (*keys.ledger_of("a {model}", "key"), keys.api_keys)}
        assert len(of_tenant) == 1
        slots |= of_tenant
    assert len(slots) == 4


def test_scripts_touch_no_key_that_they_are_not_given() -> None:
    given = {f"{part}_key" for part in ("tenant", "settled", "usage")}
    given |= {f"account.{part}" for part in ("window", "amounts", "spent", "leases", "held", "budgets")}
    for script in (RESERVE, SETTLE, REFUND, RENEW, SNAPSHOT):
        calls = re.findall(r"redis\.call\(\s*'(\w+)'(?:,\s*([^,)\s]+))?", script.text)
        assert len(calls) == script.text.count("redis.call(")
        touched = {key for command, key in calls if command != "TIME"}
        # `key` runs over three of the given ones.
        assert touched <= given | {"key"}, script.name
