# ruff: noqa: N802 - gRPC names methods as the proto does
"""`rempart.v1.Admin`: what operators call. Thin: who asks, one act of tenancy, one answer, one line of log."""

import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, nullcontext

from google.protobuf.message import Message

from rempart_platform.aliases import means_models
from rempart_platform.apis.grpc_call import Context, metadata_of
from rempart_platform.apis.grpc_errors import error_status
from rempart_platform.apis.grpc_render import tier_message
from rempart_platform.apis.services import AdminAuthenticator, bearer_token
from rempart_platform.audit.log import AuditLog
from rempart_platform.audit.records import cut
from rempart_platform.errors import RempartError, internal_error, invalid_request
from rempart_platform.generation import ServiceTier
from rempart_platform.tenancy.api_keys import ApiKey, ApiKeyStore
from rempart_platform.tenancy.limits import LimitChange, TenantLimits
from rempart_platform.tenancy.plans import Plan, PlanRegistry
from rempart_platform.tenancy.prices import ModelPrice, PriceList, PriceRegistry
from rempart_platform.tenancy.standing import STANDING, OwnStanding, StandingChange
from rempart_platform.tenancy.tenants import Tenant, TenantRegistry
from rempart_platform.tenancy.usage import UsageReader
from rempart_protos.v1 import admin_pb2, admin_pb2_grpc

_logger = logging.getLogger(__name__)

_TIER_NUMBERS = frozenset(int(tier) for tier in ServiceTier)


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Answers every call with a result or with a RempartError's rich status; each call needs the admin key."""

    def __init__(
        self,
        authenticator: AdminAuthenticator,
        tenants: TenantRegistry,
        keys: ApiKeyStore,
        usage: UsageReader,
        plans: PlanRegistry,
        prices: PriceRegistry,
        audit: AuditLog | None = None,
        aliases: Collection[str] = (),
    ) -> None:
        self._authenticator = authenticator
        self._tenants = tenants
        self._keys = keys
        self._usage = usage
        self._plans = plans
        self._prices = prices
        self._audit = audit
        self._aliases = frozenset(aliases)

    async def CreateTenant(self, request: admin_pb2.CreateTenantRequest, context: Context) -> admin_pb2.Tenant:
        async with self._act(context, request, "create_tenant", tenant=request.name):
            limits, standing = _limits(request.limits), _standing(request.standing)
            return _tenant_message(await self._tenants.create(request.name, limits, request.plan, standing))

    async def ListTenants(
        self, request: admin_pb2.ListTenantsRequest, context: Context
    ) -> admin_pb2.ListTenantsResponse:
        async with self._act(context, request, "list_tenants"):
            tenants = await self._tenants.list()
            return admin_pb2.ListTenantsResponse(tenants=[_tenant_message(tenant) for tenant in tenants])

    async def SetTenantLimits(self, request: admin_pb2.SetTenantLimitsRequest, context: Context) -> admin_pb2.Tenant:
        async with self._act(context, request, "set_tenant_limits", tenant=request.tenant):
            change = LimitChange(_limits(request.limits), tuple(request.unset), request.model)
            if change.written():  # what an alias has from the time when it was a model can be unset
                self._require_no_alias(request.model, "model")
            return _tenant_message(await self._tenants.change(request.tenant, change))

    async def SetTenantStanding(
        self, request: admin_pb2.SetTenantStandingRequest, context: Context
    ) -> admin_pb2.Tenant:
        async with self._act(context, request, "set_tenant_standing", tenant=request.tenant):
            change = StandingChange(_standing(request.standing), tuple(request.unset))
            return _tenant_message(await self._tenants.change(request.tenant, change))

    async def SetTenantPlan(self, request: admin_pb2.SetTenantPlanRequest, context: Context) -> admin_pb2.Tenant:
        async with self._act(context, request, "set_tenant_plan", tenant=request.tenant, plan=request.plan):
            return _tenant_message(await self._tenants.set_plan(request.tenant, request.plan))

    async def IssueKey(self, request: admin_pb2.IssueKeyRequest, context: Context) -> admin_pb2.IssueKeyResponse:
        async with self._act(context, request, "issue_key", tenant=request.tenant) as fields:
            tenant = await self._tenants.get(request.tenant)
            limits = _limits(request.limits)
            LimitChange(limits)  # Checked before there is a key.
            issued = await self._keys.issue(tenant.name, request.expires_s)
            fields["key_id"] = issued.key_id
            await self._tenants.change(tenant.name, LimitChange(limits, key_id=issued.key_id))
            return admin_pb2.IssueKeyResponse(key=issued.key, key_id=issued.key_id)

    async def ListKeys(self, request: admin_pb2.ListKeysRequest, context: Context) -> admin_pb2.ListKeysResponse:
        async with self._act(context, request, "list_keys", tenant=request.tenant):
            tenant = await self._tenants.get(request.tenant)
            keys = [_key_message(key, tenant) for key in await self._keys.list(tenant.name)]
            return admin_pb2.ListKeysResponse(keys=keys)

    async def SetKeyLimits(self, request: admin_pb2.SetKeyLimitsRequest, context: Context) -> admin_pb2.ApiKey:
        async with self._act(context, request, "set_key_limits", key_id=request.key_id) as fields:
            key = await self._keys.get(request.key_id)
            fields["tenant"] = key.tenant
            change = LimitChange(_limits(request.limits), tuple(request.unset), key_id=key.key_id)
            if request.HasField("expires_s"):
                key = await self._keys.set_expiry(key.key_id, request.expires_s)
            return _key_message(key, await self._tenants.change(key.tenant, change))

    async def RevokeKey(self, request: admin_pb2.RevokeKeyRequest, context: Context) -> admin_pb2.RevokeKeyResponse:
        async with self._act(context, request, "revoke_key", key_id=request.key_id) as fields:
            fields["tenant"] = (await self._keys.revoke(request.key_id)).tenant
            return admin_pb2.RevokeKeyResponse()

    async def GetUsage(self, request: admin_pb2.GetUsageRequest, context: Context) -> admin_pb2.GetUsageResponse:
        tenant = request.tenant if request.HasField("tenant") else None
        async with self._act(context, request, "get_usage", tenant=tenant or ""):
            records = [
                admin_pb2.UsageRecord(
                    tenant=record.tenant,
                    model=record.model,
                    day=record.day,
                    requests=record.requests,
                    prompt_tokens=record.prompt_tokens,
                    completion_tokens=record.completion_tokens,
                    cached_tokens=record.cached_tokens,
                    cost_nanos=record.cost_nanos,
                )
                for record in await self._usage.read(tenant)
            ]
            return admin_pb2.GetUsageResponse(records=records, currency=(await self._prices.read()).currency)

    async def SetPlan(self, request: admin_pb2.SetPlanRequest, context: Context) -> admin_pb2.Plan:
        async with self._act(context, request, "set_plan", plan=request.name):
            if request.standing.HasField("cache_group"):
                text = "A plan has no 'cache_group': who shares a cache is decided tenant by tenant."
                raise invalid_request(text, "standing.cache_group")
            of_standing = tuple(name for name in request.unset if name in STANDING)
            of_limits = tuple(name for name in request.unset if name not in STANDING)
            standing = StandingChange(_standing(request.standing), of_standing)
            limits = LimitChange(_limits(request.limits), of_limits, request.model)
            if limits.written():
                self._require_no_alias(request.model, "model")
            return _plan_message(await self._plans.set(request.name, limits, standing))

    async def ListPlans(self, request: admin_pb2.ListPlansRequest, context: Context) -> admin_pb2.ListPlansResponse:
        async with self._act(context, request, "list_plans"):
            return admin_pb2.ListPlansResponse(plans=[_plan_message(plan) for plan in await self._plans.list()])

    async def RemovePlan(self, request: admin_pb2.RemovePlanRequest, context: Context) -> admin_pb2.RemovePlanResponse:
        async with self._act(context, request, "remove_plan", plan=request.name):
            await self._plans.remove(request.name)
            return admin_pb2.RemovePlanResponse()

    async def SetPrice(self, request: admin_pb2.SetPriceRequest, context: Context) -> admin_pb2.PriceList:
        async with self._act(context, request, "set_price", model=request.price.model):
            currency = request.currency if request.HasField("currency") else None
            if request.HasField("price"):
                price = request.price
                self._require_no_alias(price.model, "price.model")
                values = ModelPrice(price.input_nanos, price.cached_nanos, price.output_nanos)
                await self._prices.set_price(price.model, values, currency)
            elif currency is not None:
                await self._prices.set_currency(currency)
            return _prices_message(await self._prices.read())

    async def ListPrices(self, request: admin_pb2.ListPricesRequest, context: Context) -> admin_pb2.PriceList:
        async with self._act(context, request, "list_prices"):
            return _prices_message(await self._prices.read())

    def _require_no_alias(self, model: str, param: str) -> None:
        if model in self._aliases:
            raise invalid_request(f"{means_models(model)}.", param)

    async def _who(self, context: Context, fields: dict[str, str]) -> str:
        try:
            return await self._authenticator.authenticate(bearer_token(metadata_of(context, "authorization")))
        except RempartError as error:
            if self._audit is not None:
                self._audit.act_refused(fields, error.kind.name.lower())
            raise

    @asynccontextmanager
    async def _act(self, context: Context, request: Message, act: str, **named: str) -> AsyncIterator[dict[str, str]]:
        """Authenticates, audits, turns errors into the call's status, and logs how it ended."""
        # What a caller wrote is cut: a log line is no place for a megabyte.
        fields = {"act": act, "peer": context.peer()}
        fields |= {name: cut(value) for name, value in named.items()}
        outcome = "cancelled"
        try:
            who = await self._who(context, fields)
            async with self._audit.act(who, request, fields) if self._audit else nullcontext():
                yield fields
            outcome = "ok"
        except RempartError as error:
            outcome = error.kind.name.lower()
            await context.abort_with_status(error_status(error))
        except Exception:
            outcome = "internal"
            _logger.exception("an admin act failed", extra={"fields": fields})
            await context.abort_with_status(error_status(internal_error()))
        finally:
            _logger.info("admin act", extra={"fields": fields | {"outcome": outcome}})


def _limits(limits: admin_pb2.TenantLimits) -> TenantLimits:
    return TenantLimits(**{field.name: value for field, value in limits.ListFields()})


def _standing(standing: admin_pb2.Standing) -> OwnStanding:
    max_tier = None
    if standing.HasField("max_tier"):
        if standing.max_tier not in _TIER_NUMBERS:
            raise invalid_request("'max_tier' must be one of priority, default, flex, batch.", "standing.max_tier")
        max_tier = ServiceTier(standing.max_tier)
    return OwnStanding(
        weight=standing.weight if standing.HasField("weight") else None,
        max_tier=max_tier,
        cache_group=standing.cache_group if standing.HasField("cache_group") else None,
        suspended=standing.suspended if standing.HasField("suspended") else None,
    )


def _standing_message(standing: OwnStanding) -> admin_pb2.Standing:
    message = admin_pb2.Standing(weight=standing.weight, cache_group=standing.cache_group, suspended=standing.suspended)
    if standing.max_tier is not None:
        message.max_tier = tier_message(standing.max_tier)
    return message


def _limits_message(limits: TenantLimits) -> admin_pb2.TenantLimits:
    return admin_pb2.TenantLimits(**limits.only_set())


def _model_messages(of_models: Mapping[str, TenantLimits]) -> list[admin_pb2.ModelLimits]:
    return [admin_pb2.ModelLimits(model=model, limits=_limits_message(each)) for model, each in of_models.items()]


def _tenant_message(tenant: Tenant) -> admin_pb2.Tenant:
    return admin_pb2.Tenant(
        name=tenant.name,
        limits=_limits_message(tenant.limits.own),
        created_s=tenant.created_s,
        plan=tenant.plan,
        model_limits=_model_messages(tenant.limits.of_models),
        standing=_standing_message(tenant.standing),
    )


def _plan_message(plan: Plan) -> admin_pb2.Plan:
    models = _model_messages(plan.limits.of_models)
    limits = _limits_message(plan.limits.own)
    standing = _standing_message(plan.standing)
    return admin_pb2.Plan(
        name=plan.name, limits=limits, model_limits=models, created_s=plan.created_s, standing=standing
    )


def _key_message(key: ApiKey, tenant: Tenant) -> admin_pb2.ApiKey:
    limits = _limits_message(tenant.limits.of_keys.get(key.key_id, TenantLimits()))
    return admin_pb2.ApiKey(
        key_id=key.key_id, tenant=key.tenant, created_s=key.created_s, expires_s=key.expires_s, limits=limits
    )


def _prices_message(prices: PriceList) -> admin_pb2.PriceList:
    models = [
        admin_pb2.ModelPrice(model=model, input_nanos=price.input, cached_nanos=price.cached, output_nanos=price.output)
        for model, price in prices.of_models.items()
    ]
    return admin_pb2.PriceList(currency=prices.currency, prices=models)
