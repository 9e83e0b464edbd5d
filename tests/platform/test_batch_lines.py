"""A line of a batch goes the way of an online request, at the batch tier, for a caller who may still ask."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from rempart_platform.apis.line_runner import OnlineLineRunner
from rempart_platform.apis.testing import MODEL, FakeDispatcher, engine_rig, fake_services
from rempart_platform.audit.records import request_fields
from rempart_platform.batch.callers import BatchCallers
from rempart_platform.endpoints.testing import Faults
from rempart_platform.errors import EngineLostError, ErrorKind, RempartError
from rempart_platform.generation import Caller, ServiceTier, Standing
from rempart_platform.oidc.authenticator import TenantMemory
from rempart_platform.request_trace import RequestTrace
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyHasher
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import own_redis

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CALLER = Caller("acme", "0" * 16)
STANDING = Standing(weight=4.0, max_tier=ServiceTier.PRIORITY, cache_group="group")


class Tenants:
    """All stand alike."""

    async def of(self, tenant: str) -> Standing:
        return STANDING


async def at_batch_tier(caller: Caller) -> Caller:
    return replace(caller, standing=Standing(max_tier=ServiceTier.BATCH))


def runner_of(dispatcher: FakeDispatcher) -> OnlineLineRunner:
    return OnlineLineRunner(fake_services(dispatcher), at_batch_tier)


def chat(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


async def test_a_chat_is_answered_at_the_batch_tier_whatever_it_asks_for() -> None:
    dispatcher = FakeDispatcher(texts=["Paris"])
    answer = await runner_of(dispatcher)(CALLER, CHAT, chat(service_tier="priority", stream=False), 60.0)
    body = json.loads(answer.body)
    assert (answer.status_code, answer.error) == (200, None)
    assert body["choices"][0]["message"]["content"] == "Paris"
    assert body["service_tier"] == "batch"
    (request,) = dispatcher.requests
    assert (request.service_tier, request.caller.tenant) == (ServiceTier.BATCH, "acme")
    assert (answer.request_id, request.timeout_s) == (request.request_id, 60.0)
    assert request.comes_again


async def test_a_completion_is_answered_with_its_echo() -> None:
    body = json.dumps({"model": MODEL, "prompt": "hi", "echo": True}).encode()
    answer = await runner_of(FakeDispatcher(texts=["Paris"]))(CALLER, COMPLETIONS, body, 60.0)
    assert json.loads(answer.body)["choices"][0]["text"] == "hiParis"


@pytest.mark.parametrize(
    ("endpoint", "body", "kind", "param"),
    [
        (CHAT, chat(stream=True), ErrorKind.INVALID_REQUEST, "stream"),
        (CHAT, chat(temperature=-1), ErrorKind.INVALID_REQUEST, "temperature"),
        (CHAT, chat(model="none"), ErrorKind.MODEL_NOT_FOUND, "model"),
        ("/v1/embeddings", chat(), ErrorKind.INVALID_REQUEST, "url"),
    ],
)
async def test_what_cannot_be_done_is_answered_as_online(
    endpoint: str, body: bytes, kind: ErrorKind, param: str
) -> None:
    dispatcher = FakeDispatcher(texts=["Paris"])
    answer = await runner_of(dispatcher)(CALLER, endpoint, body, 60.0)
    assert answer.error is not None
    assert (answer.error.kind, answer.status_code) == (kind, kind.value.http_status)
    assert json.loads(answer.body)["error"]["param"] == param
    assert dispatcher.requests == []


async def test_a_refusal_is_handed_on_with_its_wait() -> None:
    refusal = RempartError(ErrorKind.RATE_LIMIT_EXCEEDED, "wait", retry_after_s=3.0)
    answer = await runner_of(FakeDispatcher(texts=[], refusal=refusal))(CALLER, CHAT, chat(), 60.0)
    assert (answer.status_code, answer.error) == (429, refusal)


async def test_a_mistake_of_ours_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(caller: Caller) -> Caller:
        raise ZeroDivisionError

    answer = await OnlineLineRunner(fake_services(FakeDispatcher(texts=[])), broken)(CALLER, CHAT, chat(), 60.0)
    assert answer.error is not None
    assert answer.error.kind is ErrorKind.INTERNAL
    assert "ZeroDivisionError" in caplog.text
    assert b"ZeroDivision" not in answer.body


@pytest.mark.parametrize("die_at", [0, 1])
async def test_an_engine_that_went_away_with_a_line_is_told_apart(die_at: int) -> None:
    async with engine_rig(lambda prompt, choice: "Paris", faults=Faults(die_at=die_at)) as rig:
        answer = await OnlineLineRunner(rig.services, at_batch_tier)(CALLER, CHAT, chat(), 60.0)
        assert isinstance(answer.error, EngineLostError)
        again = await OnlineLineRunner(rig.services, at_batch_tier)(CALLER, CHAT, chat(), 60.0)
    assert again.error is not None
    assert again.error.kind is ErrorKind.UNAVAILABLE
    assert not isinstance(again.error, EngineLostError)  # there is none to lose


@dataclass(slots=True)
class Records:
    """What the audit log is told."""

    ended: list[dict[str, object]] = field(default_factory=list)

    def require_room(self) -> None:
        """There is."""

    def request_ended(self, trace: RequestTrace) -> None:
        self.ended.append(request_fields(trace))


async def test_its_records_name_its_tenant_and_its_tier(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rempart_platform.request_log")
    records = Records()
    async with engine_rig(lambda prompt, choice: "Paris", audit=records) as rig:
        answer = await OnlineLineRunner(rig.services, at_batch_tier)(CALLER, CHAT, chat(), 60.0)
    assert answer.error is None
    (audited,), (logged,) = records.ended, caplog.records
    who = ("acme", CALLER.key_id, "batch", "ok", answer.request_id)
    assert tuple(audited[name] for name in ("tenant", "key_id", "tier", "outcome", "request_id")) == who
    assert tuple(vars(logged)[name] for name in ("tenant", "key_id", "service_tier", "outcome", "request_id")) == who
    assert rig.ledger.usages[answer.request_id].completion_tokens == len("Paris") + 1
    assert rig.ledger.tenants[answer.request_id] == ("acme", CALLER.key_id)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as redis:
        yield redis


async def has_tenant(name: str) -> bool:
    return name == "acme"


async def test_a_caller_comes_with_its_standing_of_now(redis: RedisClient) -> None:
    callers = BatchCallers(ApiKeyStore(redis, KeyHasher(b"a pepper of 16 bytes")), Tenants(), has_tenant)
    renewed = await callers(Caller("acme", "oidc:somebody"))
    assert renewed.standing == replace(STANDING, max_tier=ServiceTier.BATCH)


async def test_a_token_is_good_for_its_batch_while_its_tenant_exists(redis: RedisClient) -> None:
    tenants = TenantRegistry(redis)
    await tenants.create("acme", TenantLimits())
    has_tenant = TenantMemory(tenants, memory_s=0.0).has
    callers = BatchCallers(ApiKeyStore(redis, KeyHasher(b"a pepper of 16 bytes")), Tenants(), has_tenant)
    assert (await callers(Caller("acme", "oidc:somebody"))).tenant == "acme"
    await redis.call(lambda redis: redis.delete(TenantKeys("acme").tenant))
    with pytest.raises(RempartError, match="does not exist any more") as caught:
        await callers(Caller("acme", "oidc:somebody"))
    assert caught.value.kind is ErrorKind.INVALID_API_KEY


async def test_a_key_that_is_revoked_expired_or_anothers_may_not_ask_any_more(redis: RedisClient) -> None:
    keys = ApiKeyStore(redis, KeyHasher(b"a pepper of 16 bytes"), clock=lambda: 1000.0)
    now, wall = 0.0, 1000.0
    callers = BatchCallers(keys, Tenants(), has_tenant, clock=lambda: now, wall_clock=lambda: wall)
    kept, expiring = [(await keys.issue("acme", expires_s)).key_id for expires_s in (0, 1500)]
    for key_id in (kept, expiring):
        assert (await callers(Caller("acme", key_id))).key_id == key_id
    for caller in (Caller("globex", kept), Caller("acme", "f" * 16)):
        with pytest.raises(RempartError) as caught:
            await callers(caller)
        assert caught.value.kind is ErrorKind.INVALID_API_KEY
    wall = 1500.0
    with pytest.raises(RempartError, match="no longer valid"):
        await callers(Caller("acme", expiring))
    await keys.revoke(kept)
    await callers(Caller("acme", kept))  # remembered
    now = 5.0
    with pytest.raises(RempartError, match="no longer valid"):
        await callers(Caller("acme", kept))
