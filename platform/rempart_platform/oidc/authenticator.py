"""Who asks with a token instead of a key of ours.

rk_…              ─► API keys
x.y.z (a JWT)     ─► signature and claims ─► the tenant it names, which must exist
"""

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rempart_platform.apis.services import AdminAuthenticator, Authenticator
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller
from rempart_platform.oidc.keys import open_key_ring
from rempart_platform.oidc.tokens import TokenVerifier, claim
from rempart_platform.oidc.values import OidcConfig
from rempart_platform.tenancy.authenticators import invalid_key
from rempart_platform.tenancy.memory import Memory
from rempart_platform.tenancy.tenants import TenantRegistry

_MAX_TENANTS = 10_000
_DIGEST_CHARS = 16
_DOTS_OF_A_TOKEN = 2


class TenantMemory:
    """Whether tenants exist, remembered for a moment, at most of `_MAX_TENANTS`.

    Args:
        tenants: asked when it is not remembered.
        memory_s: for how long it is.
        clock: monotonic seconds.
    """

    def __init__(
        self, tenants: TenantRegistry, memory_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tenants = tenants
        self._clock = clock
        self._known = Memory[str, bool](_MAX_TENANTS, memory_s, clock)

    async def has(self, name: str) -> bool:
        """Raises RempartError UNAVAILABLE when Redis is needed and does not answer."""
        known = self._known.get(name)
        if known is not None:
            return known[0]
        asked_at, exists = self._clock(), True
        try:
            await self._tenants.get(name)
        except RempartError as error:
            if error.kind is ErrorKind.UNAVAILABLE:
                raise
            exists = False
        self._known.put(name, exists, asked_at)
        return exists


class TokenAuthenticator:
    """Token → caller: the tenant that the token names, and a short digest of who holds it."""

    def __init__(self, config: OidcConfig, verifier: TokenVerifier, tenants: TenantMemory) -> None:
        self._config = config
        self._verifier = verifier
        self._tenants = tenants

    async def authenticate(self, bearer: str) -> Caller:
        """Raises RempartError: INVALID_API_KEY; UNAVAILABLE when issuer or Redis is needed and does not answer."""
        claims = await self._verifier.claims(bearer)
        tenant = claim(claims, self._config.tenant_claim)
        if not isinstance(tenant, str) or not await self._tenants.has(tenant):
            raise invalid_key()
        return Caller(tenant, holder_id(claims))


class EitherAuthenticator:
    """A key of ours, or a token."""

    def __init__(self, keys: Authenticator, tokens: Authenticator) -> None:
        self._keys = keys
        self._tokens = tokens

    async def authenticate(self, bearer: str) -> Caller:
        """Raises RempartError, as the one that is asked does."""
        return await (self._tokens if is_token(bearer) else self._keys).authenticate(bearer)


class EitherAdminAuthenticator:
    """The admin key, or a token of somebody who has the role of an admin."""

    def __init__(self, key: AdminAuthenticator, verifier: TokenVerifier, config: OidcConfig) -> None:
        self._key = key
        self._verifier = verifier
        self._config = config

    async def authenticate(self, bearer: str) -> str:
        """Raises RempartError: INVALID_API_KEY; UNAVAILABLE when the issuer is needed and does not answer."""
        try:
            return await self._key.authenticate(bearer)
        except RempartError:
            if not self._config.admin_role or not is_token(bearer):
                raise
        claims = await self._verifier.claims(bearer)
        if self._config.admin_role not in _roles(claim(claims, self._config.roles_claim)):
            raise invalid_key()
        return f"oidc:{claims['sub']}"


def _roles(value: object) -> Sequence[object]:
    """A list, or words in one text, as issuers have it."""
    if isinstance(value, str):
        return value.split()
    return value if isinstance(value, list) else ()


def is_token(bearer: str) -> bool:
    """Whether it looks like a JWT, which no API key does."""
    return bearer.count(".") == _DOTS_OF_A_TOKEN and not bearer.startswith("rk_")


def holder_id(claims: Mapping[str, Any]) -> str:
    """For logs and accounts: always the same for one subject of one issuer, and it tells nobody who that is."""
    who = f"{claims['iss']}\0{claims['sub']}"
    return "oidc:" + hashlib.sha256(who.encode()).hexdigest()[:_DIGEST_CHARS]


@dataclass(frozen=True, slots=True)
class Gates:
    """Who may ask, and who may call the Admin service."""

    tenants: Authenticator
    admins: AdminAuthenticator


@asynccontextmanager
async def open_gates(config: OidcConfig, keys: Gates, tenants: TenantRegistry) -> AsyncIterator[Gates]:
    """What lets keys in, and tokens too where the configuration names an issuer."""
    if not config.issuer:
        yield keys
        return
    async with open_key_ring(config) as ring:
        verifier = TokenVerifier(config, ring)
        tokens = TokenAuthenticator(config, verifier, TenantMemory(tenants, config.memory_s))
        yield Gates(EitherAuthenticator(keys.tenants, tokens), EitherAdminAuthenticator(keys.admins, verifier, config))
