"""`rempart.v1.Admin` as a client sees it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc.aio

from rempart_protos.v1 import admin_pb2, admin_pb2_grpc

if TYPE_CHECKING:  # exists in the stubs alone
    from rempart_protos.v1.admin_pb2_grpc import AdminAsyncStub

_TIMEOUT_S = 10.0
_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)  # usage has a record per tenant, model and day


class AdminClient:
    """Every call raises grpc.RpcError; `rpc_failure.describe` makes one line of it."""

    def __init__(self, stub: "AdminAsyncStub", admin_key: str) -> None:
        self._stub = stub
        self._metadata = (("authorization", f"Bearer {admin_key}"),)

    async def create_tenant(
        self,
        name: str,
        limits: admin_pb2.TenantLimits | None = None,
        plan: str = "",
        standing: admin_pb2.Standing | None = None,
    ) -> admin_pb2.Tenant:
        request = admin_pb2.CreateTenantRequest(name=name, limits=limits, plan=plan, standing=standing)
        return await self._stub.CreateTenant(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def list_tenants(self) -> list[admin_pb2.Tenant]:
        request = admin_pb2.ListTenantsRequest()
        return list((await self._stub.ListTenants(request, metadata=self._metadata, timeout=_TIMEOUT_S)).tenants)

    async def set_limits(
        self, tenant: str, limits: admin_pb2.TenantLimits, model: str = "", unset: Sequence[str] = ()
    ) -> admin_pb2.Tenant:
        """Limits that are neither set nor unset stay as they are."""
        request = admin_pb2.SetTenantLimitsRequest(tenant=tenant, limits=limits, model=model, unset=unset)
        return await self._stub.SetTenantLimits(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def set_standing(
        self, tenant: str, standing: admin_pb2.Standing, unset: Sequence[str] = ()
    ) -> admin_pb2.Tenant:
        """What is neither set nor unset stays as it is."""
        request = admin_pb2.SetTenantStandingRequest(tenant=tenant, standing=standing, unset=unset)
        return await self._stub.SetTenantStanding(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def set_tenant_plan(self, tenant: str, plan: str) -> admin_pb2.Tenant:
        """No plan with ""."""
        request = admin_pb2.SetTenantPlanRequest(tenant=tenant, plan=plan)
        return await self._stub.SetTenantPlan(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def set_plan(
        self,
        name: str,
        limits: admin_pb2.TenantLimits,
        model: str = "",
        unset: Sequence[str] = (),
        standing: admin_pb2.Standing | None = None,
    ) -> admin_pb2.Plan:
        """Makes the plan if need be."""
        request = admin_pb2.SetPlanRequest(name=name, limits=limits, model=model, unset=unset, standing=standing)
        return await self._stub.SetPlan(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def list_plans(self) -> list[admin_pb2.Plan]:
        request = admin_pb2.ListPlansRequest()
        return list((await self._stub.ListPlans(request, metadata=self._metadata, timeout=_TIMEOUT_S)).plans)

    async def remove_plan(self, name: str) -> None:
        request = admin_pb2.RemovePlanRequest(name=name)
        await self._stub.RemovePlan(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def set_price(self, price: admin_pb2.ModelPrice | None, currency: str | None = None) -> admin_pb2.PriceList:
        request = admin_pb2.SetPriceRequest(price=price, currency=currency)
        return await self._stub.SetPrice(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def list_prices(self) -> admin_pb2.PriceList:
        request = admin_pb2.ListPricesRequest()
        return await self._stub.ListPrices(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def issue_key(
        self, tenant: str, limits: admin_pb2.TenantLimits | None = None, expires_s: int | None = None
    ) -> admin_pb2.IssueKeyResponse:
        request = admin_pb2.IssueKeyRequest(tenant=tenant, limits=limits, expires_s=expires_s)
        return await self._stub.IssueKey(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def list_keys(self, tenant: str) -> list[admin_pb2.ApiKey]:
        request = admin_pb2.ListKeysRequest(tenant=tenant)
        return list((await self._stub.ListKeys(request, metadata=self._metadata, timeout=_TIMEOUT_S)).keys)

    async def set_key_limits(
        self, key_id: str, limits: admin_pb2.TenantLimits, unset: Sequence[str] = (), expires_s: int | None = None
    ) -> admin_pb2.ApiKey:
        """What is neither set nor unset stays as it is; `expires_s` 0 is never."""
        request = admin_pb2.SetKeyLimitsRequest(key_id=key_id, limits=limits, unset=unset, expires_s=expires_s)
        return await self._stub.SetKeyLimits(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def revoke_key(self, key_id: str) -> None:
        request = admin_pb2.RevokeKeyRequest(key_id=key_id)
        await self._stub.RevokeKey(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def read_usage(self, tenant: str | None = None) -> admin_pb2.GetUsageResponse:
        """Of one tenant, or of all."""
        request = admin_pb2.GetUsageRequest(tenant=tenant)
        return await self._stub.GetUsage(request, metadata=self._metadata, timeout=_TIMEOUT_S)


@asynccontextmanager
async def open_admin(address: str, admin_key: str) -> AsyncIterator[AdminClient]:
    """A client of the router at `address`; nothing is sent before the first call."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        yield AdminClient(admin_pb2_grpc.AdminStub(channel), admin_key)
