"""What a router's audit log promises while its storage comes and goes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rempart_platform.audit.buffer import AuditBuffer
from rempart_platform.audit.chain import ChainWriter
from rempart_platform.audit.log import AuditLog
from rempart_platform.audit.records import message_fields, request_fields
from rempart_platform.audit.sealer import Sealer
from rempart_platform.audit.testing import CHAIN, START_S, MemoryHeads, MemorySegments, read_chain
from rempart_platform.audit.values import AuditConfig, Entry, Kind
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, GenerationRequest
from rempart_platform.request_trace import RequestTrace
from rempart_protos.v1 import admin_pb2, sampling_pb2

NEVER_S = 3600.0
FAST = AuditConfig(store="memory", seal_s=0.01, backoff_s=0.01, max_backoff_s=0.02)


@dataclass
class Observer:
    num_failures: int = 0
    entries: list[Entry] = field(default_factory=list)
    on_end: Callable[[], None] = lambda: None

    def sealed(self, entries: list[Entry]) -> None:
        self.entries += entries
        if entries[-1].kind is Kind.END:
            self.on_end()

    def seal_failed(self) -> None:
        self.num_failures += 1


@dataclass
class Rig:
    log: AuditLog
    buffer: AuditBuffer
    sealer: Sealer
    running: asyncio.Task[None]
    segments: MemorySegments
    heads: MemoryHeads
    observer: Observer
    now_s: list[float]

    async def stop(self) -> None:
        self.sealer.stop()
        await asyncio.wait_for(self.running, 10)

    def records(self) -> list[dict[str, object]]:
        assert read_chain(self.segments.stored, head=self.heads.known[CHAIN]) >= 0
        lines = [line for data in self.segments.stored.values() for line in data.split(b"\n")[1:-2]]
        return [json.loads(line) for line in lines]

    def told(self, name: str) -> list[object]:
        return [record[name] for record in self.records() if name in record]


@asynccontextmanager
async def rig(config: AuditConfig = FAST, *, is_away: bool = False) -> AsyncIterator[Rig]:
    now_s = [START_S]
    buffer = AuditBuffer(config, lambda: now_s[0])
    segments, heads, observer = MemorySegments(is_away), MemoryHeads(), Observer()
    sealer = Sealer(buffer, ChainWriter(CHAIN), segments, heads, config, observer)
    buffer.add(Kind.GENESIS, {"public_key": ""})
    running = asyncio.create_task(sealer.run())
    try:
        yield Rig(AuditLog(buffer, config), buffer, sealer, running, segments, heads, observer, now_s)
    finally:
        running.cancel()
        await asyncio.wait([running])


def trace(number: int = 0, *, endpoints: tuple[str, ...] = ("engine:1",)) -> RequestTrace:
    request = GenerationRequest(
        f"request-{number}", Caller("acme", "key"), "model", (5, 6, 7), sampling_pb2.SamplingParams(max_tokens=20)
    )
    return RequestTrace(request, 1.0, endpoints=list(endpoints), ended_s=2.0)


async def test_requests_are_sealed_soon_and_a_stop_says_so() -> None:
    async with rig() as it:
        for number in range(3):
            it.log.request_ended(trace(number))
        await asyncio.wait_for(it.segments.took.wait(), 10)
        it.log.request_ended(trace(3))
        await it.stop()
        assert it.told("kind") == ["genesis", *["request"] * 4, "end"]
        assert it.told("request_id") == [f"request-{number}" for number in range(4)]
        assert len(it.observer.entries) == 6
        assert it.heads.known[CHAIN].last == 5


async def test_nothing_comes_after_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """A request that was cut off by a stop may unwind while the last record is being sealed."""
    async with rig() as it:
        it.observer.on_end = lambda: it.log.request_ended(trace())
        await it.stop()
        assert it.told("kind") == ["genesis", "end"]
        assert it.buffer.num_lost == 1
        assert "a record came after the end of the audit log" in caplog.messages


async def test_a_full_segment_is_sealed_at_once() -> None:
    async with rig(replace(FAST, seal_s=NEVER_S, max_segment_records=5)) as it:
        for number in range(4):
            it.log.request_ended(trace(number))
        await asyncio.wait_for(it.segments.took.wait(), 10)
        assert it.told("n") == [0, 1, 2, 3, 4]


async def test_a_large_backlog_is_chained_in_a_thread_and_in_order() -> None:
    async with rig(replace(FAST, seal_s=NEVER_S, max_segment_records=1000)) as it:
        for number in range(2500):
            it.log.request_ended(trace(number))
        await it.stop()
        assert it.told("n") == list(range(2502))
        assert len(it.segments.stored) == 4


async def test_a_segment_holds_records_of_one_day() -> None:
    async with rig(replace(FAST, seal_s=NEVER_S)) as it:
        it.log.request_ended(trace(0))
        it.now_s[0] += 86_400
        it.log.request_ended(trace(1))
        await it.stop()
        days = [(path.split("/")[2], data.count(b"request_id")) for path, data in it.segments.stored.items()]
        assert days == [("2023-11-14", 1), ("2023-11-15", 1), ("2023-11-15", 0)]


async def test_while_the_storage_is_away_records_wait_and_then_new_requests_are_refused() -> None:
    async with rig(replace(FAST, max_buffered=4), is_away=True) as it:
        await asyncio.wait_for(it.segments.tried.wait(), 10)
        for number in range(3):
            it.log.require_room()
            it.log.request_ended(trace(number))
        with pytest.raises(RempartError, match=r"4 records wait \(audit_max_buffered\)") as raised:
            it.log.require_room()
        assert raised.value.kind is ErrorKind.UNAVAILABLE
        it.log.request_ended(trace(3))  # it was admitted before
        it.log.request_ended(trace(4, endpoints=()))  # it was refused
        it.segments.is_away = False
        await it.stop()
        it.log.require_room()
        assert it.told("request_id") == [f"request-{number}" for number in range(4)]
        assert it.told("lost") == [1]
        assert it.observer.num_failures >= 1


async def test_a_tenant_that_is_refused_again_and_again_leaves_room_for_the_others() -> None:
    async with rig(replace(FAST, max_buffered=10), is_away=True) as it:
        await asyncio.wait_for(it.segments.tried.wait(), 10)
        for number in range(100):
            it.log.request_ended(trace(number, endpoints=()))
        assert len(it.buffer) == 5
        it.log.require_room()
        it.log.request_ended(trace(100))
        it.segments.is_away = False
        await it.stop()
        assert it.told("request_id") == [*(f"request-{number}" for number in range(4)), "request-100"]
        assert it.told("lost") == [96]


async def test_dropping_goes_on_counts_and_leaves_a_gap_in_its_place() -> None:
    async with rig(replace(FAST, max_buffered=3, when_full="drop"), is_away=True) as it:
        await asyncio.wait_for(it.segments.tried.wait(), 10)
        for number in range(7):
            it.log.require_room()
            it.log.request_ended(trace(number))
        assert (len(it.buffer), it.buffer.num_lost) == (3, 5)
        it.segments.is_away = False
        await asyncio.wait_for(it.segments.took.wait(), 10)
        it.log.request_ended(trace(7))
        await it.stop()
        kinds = it.told("kind")
        assert [kind for kind in kinds if kind != "request"] == ["genesis", "gap", "end"]
        assert it.told("lost") == [5]
        assert it.told("request_id") == ["request-0", "request-1", "request-7"]
        assert it.buffer.num_lost == 5


async def test_a_segment_whose_answer_was_lost_is_put_again_as_it_was() -> None:
    async with rig() as it:
        it.segments.loses_an_answer = True
        it.log.request_ended(trace())
        await it.stop()
        assert it.told("kind") == ["genesis", "request", "end"]
        assert it.observer.num_failures == 1


REQUEST = admin_pb2.IssueKeyRequest(tenant="acme", expires_s=5)


async def test_an_act_is_sealed_before_it_is_done_and_its_outcome_before_it_is_answered() -> None:
    async with rig(replace(FAST, seal_s=NEVER_S)) as it:
        fields = {"act": "issue_key", "tenant": "acme"}
        async with it.log.act("admin key", REQUEST, fields):
            assert it.told("kind") == ["genesis", "act"]
            fields["key_id"] = "0123"
        asked, outcome = it.records()[1:]
        assert (asked["who"], asked["act"], asked["tenant"]) == ("admin key", "issue_key", "acme")
        assert asked["request"] == {"tenant": "acme", "expires_s": "5"}
        assert (outcome["outcome"], outcome["key_id"], outcome["act_id"]) == ("ok", "0123", asked["act_id"])


async def test_how_an_act_failed_is_recorded() -> None:
    async with rig() as it:
        for error in (RempartError(ErrorKind.NOT_FOUND, "no"), KeyError("ours")):
            with pytest.raises(type(error)):
                async with it.log.act("admin key", REQUEST, {"act": "issue_key"}):
                    raise error
        assert it.told("outcome") == ["not_found", "internal"]


async def test_an_act_that_cannot_be_recorded_is_not_done() -> None:
    async with rig(replace(FAST, act_timeout_s=0.05), is_away=True) as it:
        with pytest.raises(RempartError, match="Nothing was done") as raised:
            async with it.log.act("admin key", REQUEST, {"act": "issue_key"}):
                raise AssertionError("it was done")
        assert raised.value.kind is ErrorKind.UNAVAILABLE
        it.segments.is_away = False
        await it.stop()
        assert it.told("outcome") == ["not_begun"]


async def test_an_act_whose_outcome_cannot_be_recorded_is_answered_with_that() -> None:
    async with rig(replace(FAST, act_timeout_s=1.0)) as it:
        with pytest.raises(RempartError, match="has been tried"):
            async with it.log.act("admin key", REQUEST, {"act": "issue_key"}):
                it.segments.is_away = True
        it.segments.is_away = False
        await it.stop()
        assert it.told("outcome") == ["ok"]


async def test_acts_are_refused_at_once_when_nothing_more_may_wait() -> None:
    async with rig(replace(FAST, max_buffered=1), is_away=True) as it:
        with pytest.raises(RempartError, match="Nothing was done"):
            async with it.log.act("admin key", REQUEST, {"act": "issue_key"}):
                raise AssertionError("it was done")


async def test_acts_that_are_refused_at_once_do_not_pile_up() -> None:
    async with rig(replace(FAST, max_buffered=1), is_away=True) as it:
        for _ in range(100):
            with pytest.raises(RempartError, match="Nothing was done"):
                async with it.log.act("admin key", REQUEST, {"act": "issue_key"}):
                    raise AssertionError("it was done")
        assert len(it.buffer) == 1
        it.segments.is_away = False
        await it.stop()
        assert it.told("lost") == [100]


async def test_who_has_no_right_cannot_fill_the_log() -> None:
    """Neither while its storage is away, when tenants would be refused, nor at all."""
    async with rig(replace(FAST, max_buffered=50, max_refused_acts=10), is_away=True) as it:
        await asyncio.wait_for(it.segments.tried.wait(), 10)
        for _ in range(1000):
            it.log.act_refused({"act": "list_tenants"}, "invalid_api_key")
        assert len(it.buffer) == 11
        it.log.require_room()
        it.segments.is_away = False
        await it.stop()
        assert it.told("outcome") == ["invalid_api_key"] * 10 + ["refused"]
        assert it.told("times") == [990]
        assert it.buffer.num_lost == 0


async def test_an_act_whose_caller_leaves_is_recorded_too() -> None:
    async with rig() as it:
        begun = asyncio.Event()

        async def act() -> None:
            async with it.log.act("admin key", REQUEST, {"act": "issue_key"}):
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(act())
        await asyncio.wait_for(begun.wait(), 10)
        task.cancel()
        await asyncio.wait([task])
        await it.stop()
        assert it.told("outcome") == ["cancelled"]


def test_secrets_and_long_texts_stay_out() -> None:
    shown = message_fields(admin_pb2.IssueKeyResponse(key="rk_secret", key_id="0123"))
    assert shown == {"key": "hidden", "key_id": "0123"}
    long = message_fields(admin_pb2.SetTenantLimitsRequest(tenant="t" * 10_000, unset=["u" * 10_000] * 10_000))
    assert len(json.dumps(long)) < 6_000


def test_a_requests_record_holds_neither_its_tokens_nor_what_the_client_chose() -> None:
    request = replace(trace().request, user="somebody", prompt_cache_key="a key", stop=("stop here",))
    fields = request_fields(replace(trace(), request=request))
    assert fields["tenant"] == "acme"
    assert fields["endpoints"] == ("engine:1",)
    assert not {"user", "stop", "prompt_token_ids", "prompt_cache_key"} & fields.keys()
    assert not any(word in json.dumps(fields) for word in ("somebody", "a key", "stop here"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_buffered": 0},
        {"max_segment_records": 0},
        {"max_segment_records": 100_001},
        {"max_refused_acts": 0},
        {"seal_s": 0.0},
        {"max_backoff_s": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(AuditConfig(), **wrong)


def test_settings_of_a_log_that_is_not_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="--audit-retention-days goes with --audit-store"):
        AuditConfig(retention_days=30)
    with pytest.raises(ValueError, match="--audit-signing-key goes with --audit-store"):
        AuditConfig(signing_key="key.pem")
