import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # the package ships none

from rempart_platform.apis.admin import AdminServicer
from rempart_platform.console.admin_client import open_admin
from rempart_platform.generation import Caller, Usage
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyHasher
from rempart_platform.tenancy.authenticators import AdminAuthenticator, Authenticator
from rempart_platform.tenancy.embedded import EmbeddedRedis, EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import PriceRegistry
from rempart_platform.tenancy.quota import Ledger, QuotaConfig
from rempart_platform.tenancy.redis_client import RedisClient, RedisConfig, connect_redis
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import RecordingObserver
from rempart_platform.tenancy.usage import UsageReader
from rempart_protos.v1 import admin_pb2 as pb
from rempart_protos.v1 import admin_pb2_grpc, inference_pb2

ADMIN_KEY = "an admin key that is long enough"
HASHER = KeyHasher(b"a pepper of 16 bytes or more")
CREDENTIALS = (("authorization", f"Bearer {ADMIN_KEY}"),)


@dataclass
class Service:
    """A served Admin and the Redis behind it."""

    server: EmbeddedRedis
    redis: RedisClient
    admin: "admin_pb2_grpc.AdminAsyncStub"
    address: str


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(RedisConfig(server.url, timeout_s=2.0)) as redis,
    ):
        tenants = TenantRegistry(redis)
        servicer = AdminServicer(
            AdminAuthenticator(ADMIN_KEY),
            tenants,
            ApiKeyStore(redis, HASHER),
            UsageReader(redis, tenants),
            PlanRegistry(redis),
            PriceRegistry(redis),
            aliases=["chat"],
        )
        grpc_server = grpc.aio.server()
        admin_pb2_grpc.add_AdminServicer_to_server(servicer, grpc_server)
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Service(server, redis, admin_pb2_grpc.AdminStub(channel), f"127.0.0.1:{port}")
        finally:
            await grpc_server.stop(grace=None)


async def _refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Code and details by type name."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    trailer = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(trailer)
    assert (status.code, status.message) == (raised.value.code().value[0], raised.value.details())
    details = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().rsplit(".", 1)[1])()
        packed.Unpack(message)
        details[packed.TypeName().rsplit(".", 1)[1]] = message
    return raised.value.code(), details


async def test_tenant_is_created_listed_and_changed(service: Service) -> None:
    admin = service.admin
    created = await admin.CreateTenant(
        pb.CreateTenantRequest(name="acme", limits=pb.TenantLimits(requests_per_minute=50, concurrency=0)),
        metadata=CREDENTIALS,
    )
    assert created.limits.requests_per_minute == 50
    assert created.limits.HasField("concurrency")
    assert not created.limits.HasField("tokens_per_minute")
    changed = await admin.SetTenantLimits(
        pb.SetTenantLimitsRequest(tenant="acme", limits=pb.TenantLimits(tokens_per_minute=1000)), metadata=CREDENTIALS
    )
    assert (changed.limits.requests_per_minute, changed.limits.tokens_per_minute) == (50, 1000)
    listed = await admin.ListTenants(pb.ListTenantsRequest(), metadata=CREDENTIALS)
    assert list(listed.tenants) == [changed]


async def test_usage_of_years_reaches_the_client(service: Service) -> None:
    await TenantRegistry(service.redis).create("acme", TenantLimits())
    usage = {
        f"2026-11-{day} {counter} {'m' * 2**20}": 1
        for day in range(10, 16)
        for counter in ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
    }
    await service.redis.write_hash(TenantKeys("acme").usage, usage)
    async with open_admin(service.address, ADMIN_KEY) as admin:
        answer = await admin.read_usage()
    assert len(answer.records) == 6
    assert answer.ByteSize() > 4 * 2**20, "what gRPC takes when it is not told otherwise"


async def test_issued_key_authenticates_until_it_is_revoked(service: Service) -> None:
    admin = service.admin
    await admin.CreateTenant(pb.CreateTenantRequest(name="acme"), metadata=CREDENTIALS)
    issued = await admin.IssueKey(pb.IssueKeyRequest(tenant="acme"), metadata=CREDENTIALS)
    authenticator = Authenticator(ApiKeyStore(service.redis, HASHER), HASHER, cache_s=0.0)
    assert await authenticator.authenticate(issued.key) == Caller("acme", issued.key_id)

    listed = await admin.ListKeys(pb.ListKeysRequest(tenant="acme"), metadata=CREDENTIALS)
    assert [(key.key_id, key.tenant) for key in listed.keys] == [(issued.key_id, "acme")]
    assert issued.key.rsplit("_", 1)[1] not in str(listed)

    await admin.RevokeKey(pb.RevokeKeyRequest(key_id=issued.key_id), metadata=CREDENTIALS)
    assert not (await admin.ListKeys(pb.ListKeysRequest(tenant="acme"), metadata=CREDENTIALS)).keys
    with pytest.raises(Exception, match="not valid"):
        await authenticator.authenticate(issued.key)


async def test_usage_is_reported(service: Service) -> None:
    await service.admin.CreateTenant(pb.CreateTenantRequest(name="acme"), metadata=CREDENTIALS)
    ledger = Ledger(service.redis, QuotaConfig(), RecordingObserver(), clock=lambda: 0.0)
    await ledger.settle(await ledger.reserve("acme", "request", 100), Usage(10, 5, 4), "some model")
    for request in (pb.GetUsageRequest(), pb.GetUsageRequest(tenant="acme")):
        (record,) = (await service.admin.GetUsage(request, metadata=CREDENTIALS)).records
        assert (record.tenant, record.model, record.requests) == ("acme", "some model", 1)
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (10, 5, 4)


async def test_plans_prices_and_limits_of_models_and_keys(service: Service) -> None:
    admin = service.admin
    await admin.SetPlan(pb.SetPlanRequest(name="gold", limits=pb.TenantLimits(concurrency=5)), metadata=CREDENTIALS)
    plan = await admin.SetPlan(
        pb.SetPlanRequest(name="gold", model="m", limits=pb.TenantLimits(tokens_per_day=9)), metadata=CREDENTIALS
    )
    assert plan.limits == pb.TenantLimits(concurrency=5)
    assert list(plan.model_limits) == [pb.ModelLimits(model="m", limits=pb.TenantLimits(tokens_per_day=9))]
    assert list((await admin.ListPlans(pb.ListPlansRequest(), metadata=CREDENTIALS)).plans) == [plan]
    tenant = await admin.CreateTenant(pb.CreateTenantRequest(name="acme", plan="gold"), metadata=CREDENTIALS)
    assert tenant.plan == "gold"
    changed = await admin.SetTenantLimits(
        pb.SetTenantLimitsRequest(tenant="acme", model="m", limits=pb.TenantLimits(tokens_per_day=3)),
        metadata=CREDENTIALS,
    )
    assert changed.model_limits[0].limits.tokens_per_day == 3
    changed = await admin.SetTenantLimits(
        pb.SetTenantLimitsRequest(tenant="acme", model="m", unset=["tokens_per_day"]), metadata=CREDENTIALS
    )
    assert not changed.model_limits
    code, details = await _refused(admin.RemovePlan(pb.RemovePlanRequest(name="gold"), metadata=CREDENTIALS))
    assert (code, details["BadRequest"].field_violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, "name")
    await admin.SetTenantPlan(pb.SetTenantPlanRequest(tenant="acme"), metadata=CREDENTIALS)
    await admin.RemovePlan(pb.RemovePlanRequest(name="gold"), metadata=CREDENTIALS)

    limits = pb.TenantLimits(concurrency=2)
    issued = await admin.IssueKey(pb.IssueKeyRequest(tenant="acme", limits=limits), metadata=CREDENTIALS)
    key = await admin.SetKeyLimits(
        pb.SetKeyLimitsRequest(key_id=issued.key_id, unset=["concurrency"], expires_s=2_000_000_000),
        metadata=CREDENTIALS,
    )
    assert (key.limits, key.expires_s) == (pb.TenantLimits(), 2_000_000_000)
    await admin.SetKeyLimits(pb.SetKeyLimitsRequest(key_id=issued.key_id, limits=limits), metadata=CREDENTIALS)
    await admin.RevokeKey(pb.RevokeKeyRequest(key_id=issued.key_id), metadata=CREDENTIALS)
    stored = await service.redis.read_hash("rempart:{acme}:tenant")
    assert list(stored) == ["created_s"], "a key leaves no limits behind"

    price = pb.ModelPrice(model="m", input_nanos=270, cached_nanos=70, output_nanos=1100)
    prices = await admin.SetPrice(pb.SetPriceRequest(price=price, currency="EUR"), metadata=CREDENTIALS)
    assert prices == pb.PriceList(currency="EUR", prices=[price])
    usage = await admin.GetUsage(pb.GetUsageRequest(), metadata=CREDENTIALS)
    assert usage.currency == "EUR"
    for request, field in (
        (pb.SetPriceRequest(price=pb.ModelPrice(model="m", cached_nanos=1)), "price.cached"),
        (pb.SetPriceRequest(price=pb.ModelPrice(input_nanos=1)), "model"),
        (pb.SetPriceRequest(currency=""), "currency"),
        (pb.SetPriceRequest(price=pb.ModelPrice(model="m"), currency="x" * 16), "currency"),
        (pb.SetPriceRequest(price=pb.ModelPrice(), currency="USD"), "model"),
    ):
        code, details = await _refused(admin.SetPrice(request, metadata=CREDENTIALS))
        assert (code, details["BadRequest"].field_violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert await admin.ListPrices(pb.ListPricesRequest(), metadata=CREDENTIALS) == prices, "all or nothing"
    unset = pb.SetTenantLimitsRequest(tenant="acme", unset=["patience"])
    code, details = await _refused(admin.SetTenantLimits(unset, metadata=CREDENTIALS))
    assert details["BadRequest"].field_violations[0].field == "unset"


async def test_an_alias_has_neither_limits_nor_prices(service: Service) -> None:
    admin = service.admin
    await admin.CreateTenant(pb.CreateTenantRequest(name="acme"), metadata=CREDENTIALS)
    limits = pb.TenantLimits(tokens_per_day=5)
    for call, field in (
        (admin.SetPrice(pb.SetPriceRequest(price=pb.ModelPrice(model="chat")), metadata=CREDENTIALS), "price.model"),
        (
            admin.SetTenantLimits(
                pb.SetTenantLimitsRequest(tenant="acme", model="chat", limits=limits), metadata=CREDENTIALS
            ),
            "model",
        ),
        (admin.SetPlan(pb.SetPlanRequest(name="gold", model="chat", limits=limits), metadata=CREDENTIALS), "model"),
    ):
        code, details = await _refused(call)
        (violation,) = details["BadRequest"].field_violations
        assert (code, violation.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert violation.description == "'chat' is an alias; limits and prices are of the models that it stands for."
    assert not (await admin.ListPrices(pb.ListPricesRequest(), metadata=CREDENTIALS)).prices
    assert not (await admin.ListPlans(pb.ListPlansRequest(), metadata=CREDENTIALS)).plans
    unset = pb.SetTenantLimitsRequest(tenant="acme", model="chat", unset=["tokens_per_day"])
    await admin.SetTenantLimits(unset, metadata=CREDENTIALS)  # left from when it was a model


async def test_tenants_and_plans_have_a_standing(service: Service) -> None:
    admin = service.admin
    priority, flex = inference_pb2.SERVICE_TIER_PRIORITY, inference_pb2.SERVICE_TIER_FLEX
    standing = pb.Standing(weight=4.0, max_tier=priority)
    plan = await admin.SetPlan(pb.SetPlanRequest(name="gold", standing=standing), metadata=CREDENTIALS)
    assert plan.standing == standing
    unset = pb.SetPlanRequest(name="gold", unset=["weight", "concurrency"], limits=pb.TenantLimits(tokens_per_day=9))
    plan = await admin.SetPlan(unset, metadata=CREDENTIALS)
    assert (plan.standing, plan.limits.tokens_per_day) == (pb.Standing(max_tier=priority), 9)

    own = pb.Standing(weight=0.5, cache_group="house")
    created = await admin.CreateTenant(
        pb.CreateTenantRequest(name="acme", plan="gold", standing=own), metadata=CREDENTIALS
    )
    assert created.standing == own, "what is inherited is not shown as its own"
    change = pb.SetTenantStandingRequest(tenant="acme", standing=pb.Standing(max_tier=flex), unset=["cache_group"])
    changed = await admin.SetTenantStanding(change, metadata=CREDENTIALS)
    assert changed.standing == pb.Standing(weight=0.5, max_tier=flex)
    assert list((await admin.ListTenants(pb.ListTenantsRequest(), metadata=CREDENTIALS)).tenants) == [changed]

    no_tier = pb.Standing(max_tier=inference_pb2.SERVICE_TIER_UNSPECIFIED)
    refused: list[tuple[str, Any, str]] = [
        ("SetPlan", pb.SetPlanRequest(name="gold", standing=own), "standing.cache_group"),
        ("SetPlan", pb.SetPlanRequest(name="new", standing=pb.Standing(weight=-1)), "standing.weight"),
        ("CreateTenant", pb.CreateTenantRequest(name="new", standing=pb.Standing(weight=0)), "standing.weight"),
        ("SetTenantStanding", pb.SetTenantStandingRequest(tenant="acme", unset=["plan"]), "unset"),
        ("SetTenantStanding", pb.SetTenantStandingRequest(tenant="acme", standing=no_tier), "standing.max_tier"),
    ]
    for name, request, field in refused:
        code, details = await _refused(getattr(admin, name)(request, metadata=CREDENTIALS))
        assert (code, details["BadRequest"].field_violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert len((await admin.ListPlans(pb.ListPlansRequest(), metadata=CREDENTIALS)).plans) == 1, "none was made"


_CALLS: list[tuple[str, Any]] = [
    ("CreateTenant", pb.CreateTenantRequest(name="acme")),
    ("ListTenants", pb.ListTenantsRequest()),
    ("SetTenantLimits", pb.SetTenantLimitsRequest(tenant="acme")),
    ("IssueKey", pb.IssueKeyRequest(tenant="acme")),
    ("ListKeys", pb.ListKeysRequest(tenant="acme")),
    ("RevokeKey", pb.RevokeKeyRequest(key_id="0" * 16)),
    ("GetUsage", pb.GetUsageRequest()),
    ("SetTenantPlan", pb.SetTenantPlanRequest(tenant="acme")),
    ("SetKeyLimits", pb.SetKeyLimitsRequest(key_id="0" * 16)),
    ("SetTenantStanding", pb.SetTenantStandingRequest(tenant="acme")),
    ("SetPlan", pb.SetPlanRequest(name="gold")),
    ("ListPlans", pb.ListPlansRequest()),
    ("RemovePlan", pb.RemovePlanRequest(name="gold")),
    ("SetPrice", pb.SetPriceRequest(currency="EUR")),
    ("ListPrices", pb.ListPricesRequest()),
]


def test_list_of_calls_is_complete() -> None:
    methods = pb.DESCRIPTOR.services_by_name["Admin"].methods
    assert [name for name, _ in _CALLS] == [method.name for method in methods]


@pytest.mark.parametrize(("name", "request_message"), _CALLS)
async def test_no_call_answers_without_the_admin_key(service: Service, name: str, request_message: Any) -> None:
    call = getattr(service.admin, name)
    for metadata in (
        (),
        (("authorization", ADMIN_KEY),),
        (("authorization", f"Basic {ADMIN_KEY}"),),
        (("authorization", f"Bearer {ADMIN_KEY}x"),),
    ):
        code, details = await _refused(call(request_message, metadata=metadata))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert details["ErrorInfo"].reason == "invalid_api_key"
    assert not (await service.admin.ListTenants(pb.ListTenantsRequest(), metadata=CREDENTIALS)).tenants


async def test_errors_name_the_field_at_fault(service: Service) -> None:
    admin = service.admin
    code, details = await _refused(admin.CreateTenant(pb.CreateTenantRequest(name="A b"), metadata=CREDENTIALS))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "name"

    huge = pb.CreateTenantRequest(name="acme", limits=pb.TenantLimits(tokens_per_minute=2**64 - 1))
    code, details = await _refused(admin.CreateTenant(huge, metadata=CREDENTIALS))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "limits.tokens_per_minute"

    await admin.CreateTenant(pb.CreateTenantRequest(name="acme"), metadata=CREDENTIALS)
    code, _ = await _refused(admin.CreateTenant(pb.CreateTenantRequest(name="acme"), metadata=CREDENTIALS))
    assert code is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("name", "request_message"),
    [
        ("SetTenantLimits", pb.SetTenantLimitsRequest(tenant="nobody")),
        ("IssueKey", pb.IssueKeyRequest(tenant="nobody")),
        ("ListKeys", pb.ListKeysRequest(tenant="nobody")),
        ("RevokeKey", pb.RevokeKeyRequest(key_id="0" * 16)),
        ("GetUsage", pb.GetUsageRequest(tenant="nobody")),
        ("SetTenantPlan", pb.SetTenantPlanRequest(tenant="nobody")),
        ("SetTenantStanding", pb.SetTenantStandingRequest(tenant="nobody")),
        ("CreateTenant", pb.CreateTenantRequest(name="acme", plan="none")),
        ("SetKeyLimits", pb.SetKeyLimitsRequest(key_id="0" * 16)),
        ("RemovePlan", pb.RemovePlanRequest(name="none")),
    ],
)
async def test_what_does_not_exist_is_not_found(service: Service, name: str, request_message: Any) -> None:
    code, details = await _refused(getattr(service.admin, name)(request_message, metadata=CREDENTIALS))
    assert code is grpc.StatusCode.NOT_FOUND
    assert details["ErrorInfo"].reason == "not_found"


async def test_redis_that_hangs_is_unavailable_with_a_retry_delay(service: Service) -> None:
    os.kill(service.server.pid, signal.SIGSTOP)
    code, details = await _refused(service.admin.ListTenants(pb.ListTenantsRequest(), metadata=CREDENTIALS))
    os.kill(service.server.pid, signal.SIGCONT)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert details["RetryInfo"].retry_delay.ToSeconds() == 1


async def test_each_act_writes_one_line_without_secrets(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rempart_platform.apis.admin")
    await service.admin.CreateTenant(pb.CreateTenantRequest(name="acme"), metadata=CREDENTIALS)
    issued = await service.admin.IssueKey(pb.IssueKeyRequest(tenant="acme"), metadata=CREDENTIALS)
    await _refused(service.admin.IssueKey(pb.IssueKeyRequest(tenant="x" * 10_000), metadata=CREDENTIALS))
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [(line["act"], line["outcome"], line["tenant"]) for line in fields] == [
        ("create_tenant", "ok", "acme"),
        ("issue_key", "ok", "acme"),
        ("issue_key", "invalid_request", "x" * 63),
    ]
    assert fields[1]["key_id"] == issued.key_id
    assert issued.key.rsplit("_", 1)[1] not in str(fields)
    assert ADMIN_KEY not in str(fields)


async def test_failure_of_ours_is_internal_and_tells_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TenantRegistry) -> None:
        raise ZeroDivisionError("an address, a path")

    monkeypatch.setattr(TenantRegistry, "list", fail)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.admin.ListTenants(pb.ListTenantsRequest(), metadata=CREDENTIALS)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "path" not in str(raised.value.details())
