# ruff: noqa: N802 - gRPC names methods as the proto does
"""`rempart.v1.Admin`: what operators call. Thin: who asks, one act of tenancy, one answer, one line of log."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc

from rempart_platform.apis.grpc_errors import error_status
from rempart_platform.apis.services import bearer_token
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.api_keys import AdminAuthenticator, ApiKeyStore
from rempart_platform.tenancy.tenants import Tenant, TenantLimits, TenantRegistry
from rempart_platform.tenancy.usage import UsageReader
from rempart_protos.v1 import admin_pb2, admin_pb2_grpc

logger = logging.getLogger(__name__)

# Any: one context type serves methods of all message types.
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_MAX_LOGGED_CHARS = 63


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Answers every call with a result or with a RempartError's rich status; each call needs the admin key."""

    def __init__(
        self, authenticator: AdminAuthenticator, tenants: TenantRegistry, keys: ApiKeyStore, usage: UsageReader
    ) -> None:
        self._authenticator = authenticator
        self._tenants = tenants
        self._keys = keys
        self._usage = usage

    async def CreateTenant(self, request: admin_pb2.CreateTenantRequest, context: _Context) -> admin_pb2.Tenant:
        async with self._act(context, "create_tenant", tenant=request.name):
            return _tenant_message(await self._tenants.create(request.name, _limits(request.limits)))

    async def ListTenants(
        self, request: admin_pb2.ListTenantsRequest, context: _Context
    ) -> admin_pb2.ListTenantsResponse:
        async with self._act(context, "list_tenants"):
            tenants = await self._tenants.list()
            return admin_pb2.ListTenantsResponse(tenants=[_tenant_message(tenant) for tenant in tenants])

    async def SetTenantLimits(self, request: admin_pb2.SetTenantLimitsRequest, context: _Context) -> admin_pb2.Tenant:
        async with self._act(context, "set_tenant_limits", tenant=request.tenant):
            return _tenant_message(await self._tenants.set_limits(request.tenant, _limits(request.limits)))

    async def IssueKey(self, request: admin_pb2.IssueKeyRequest, context: _Context) -> admin_pb2.IssueKeyResponse:
        async with self._act(context, "issue_key", tenant=request.tenant) as fields:
            tenant = await self._tenants.get(request.tenant)
            issued = await self._keys.issue(tenant.name)
            fields["key_id"] = issued.key_id
            return admin_pb2.IssueKeyResponse(key=issued.key, key_id=issued.key_id)

    async def ListKeys(self, request: admin_pb2.ListKeysRequest, context: _Context) -> admin_pb2.ListKeysResponse:
        async with self._act(context, "list_keys", tenant=request.tenant):
            tenant = await self._tenants.get(request.tenant)
            keys = [
                admin_pb2.ApiKey(key_id=key.key_id, tenant=key.tenant, created_s=key.created_s)
                for key in await self._keys.list(tenant.name)
            ]
            return admin_pb2.ListKeysResponse(keys=keys)

    async def RevokeKey(self, request: admin_pb2.RevokeKeyRequest, context: _Context) -> admin_pb2.RevokeKeyResponse:
        async with self._act(context, "revoke_key", key_id=request.key_id) as fields:
            fields["tenant"] = (await self._keys.revoke(request.key_id)).tenant
            return admin_pb2.RevokeKeyResponse()

    async def GetUsage(self, request: admin_pb2.GetUsageRequest, context: _Context) -> admin_pb2.GetUsageResponse:
        tenant = request.tenant if request.HasField("tenant") else None
        async with self._act(context, "get_usage", tenant=tenant or ""):
            records = [
                admin_pb2.UsageRecord(
                    tenant=record.tenant,
                    model=record.model,
                    day=record.day,
                    requests=record.requests,
                    prompt_tokens=record.prompt_tokens,
                    completion_tokens=record.completion_tokens,
                    cached_tokens=record.cached_tokens,
                )
                for record in await self._usage.read(tenant)
            ]
            return admin_pb2.GetUsageResponse(records=records)

    @asynccontextmanager
    async def _act(self, context: _Context, act: str, **named: str) -> AsyncIterator[dict[str, str]]:
        """Authenticates, turns errors into the call's status, and logs how it ended."""
        # What a caller wrote is cut: a log line is no place for a megabyte.
        fields = {"act": act, "peer": context.peer()}
        fields |= {name: value[:_MAX_LOGGED_CHARS] for name, value in named.items()}
        outcome = "cancelled"
        try:
            self._authenticator.authenticate(_bearer(context))
            yield fields
            outcome = "ok"
        except RempartError as error:
            outcome = error.kind.name.lower()
            await context.abort_with_status(error_status(error))
        except Exception:
            outcome = "internal"
            logger.exception("an admin act failed", extra={"fields": fields})
            await context.abort_with_status(
                error_status(RempartError(ErrorKind.INTERNAL, "The service failed to answer."))
            )
        finally:
            logger.info("admin act", extra={"fields": fields | {"outcome": outcome}})


def _bearer(context: _Context) -> str:
    metadata = dict(context.invocation_metadata() or ())
    return bearer_token(str(metadata.get("authorization", "")))


def _limits(limits: admin_pb2.TenantLimits) -> TenantLimits:
    return TenantLimits(**{field.name: value for field, value in limits.ListFields()})


def _tenant_message(tenant: Tenant) -> admin_pb2.Tenant:
    limits = admin_pb2.TenantLimits(**tenant.limits.only_set())
    return admin_pb2.Tenant(name=tenant.name, limits=limits, created_s=tenant.created_s)
