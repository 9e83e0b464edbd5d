"""A bearer token → its claims, or the one answer to whatever is not valid."""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jwt

from rempart_platform.oidc.values import OidcConfig
from rempart_platform.tenancy.authenticators import invalid_key
from rempart_platform.tenancy.memory import Memory

_MAX_REMEMBERED = 10_000
_REQUIRED = ["exp", "iss", "aud", "sub"]
# PyJWT's own, and what Python's JSON and numbers may raise for a document that was made to hurt.
_NOT_VALID = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)


class Keys(Protocol):
    """Where keys are found; `KeyRing` in production."""

    async def find(self, kid: str) -> jwt.PyJWK | None:
        """Raises RempartError UNAVAILABLE."""
        ...


class TokenVerifier:
    """Checks signature, algorithm, issuer, audience and times.

    Args:
        config: what a token must say.
        keys: the issuer's.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch, for tokens that expire.
    """

    def __init__(
        self,
        config: OidcConfig,
        keys: Keys,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._keys = keys
        self._clock = clock
        self._wall_clock = wall_clock
        self._valid = Memory[bytes, Mapping[str, Any]](_MAX_REMEMBERED, config.memory_s, clock)

    async def claims(self, token: str) -> Mapping[str, Any]:
        """What the issuer says of the token's holder.

        Raises:
            RempartError: INVALID_API_KEY; UNAVAILABLE when the issuer's keys are needed and cannot be had.
        """
        if len(token) > self._config.max_token_bytes:
            raise invalid_key()
        digest = hashlib.sha256(token.encode()).digest()
        known = self._valid.get(digest)
        if known is not None and not self._is_over(known[0]):
            return known[0]
        asked_at = self._clock()
        claims = await self._verify(token)
        self._valid.put(digest, claims, asked_at)
        return claims

    def _is_over(self, claims: Mapping[str, Any]) -> bool:
        return self._wall_clock() >= int(claims["exp"]) + self._config.leeway_s

    async def _verify(self, token: str) -> Mapping[str, Any]:
        algorithm, kid = self._header(token)
        key = await self._keys.find(kid)
        # The key decides how it is used: a token that says otherwise is a forgery.
        if key is None or key.algorithm_name != algorithm:
            raise invalid_key()
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=self._config.leeway_s,
                options={"require": _REQUIRED, "enforce_minimum_key_length": True},
            )
        except _NOT_VALID:
            raise invalid_key() from None
        # It names somebody in logs; what cannot be printed may be no text at all.
        if not claims["sub"] or not claims["sub"].isprintable():
            raise invalid_key()
        return claims

    def _header(self, token: str) -> tuple[str, str]:
        """Algorithm and `kid`, checked before any key is looked for."""
        try:
            header = jwt.get_unverified_header(token)
        except _NOT_VALID:
            raise invalid_key() from None
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in self._config.allowed or not isinstance(kid, str):
            raise invalid_key()
        return algorithm, kid


def claim(claims: Mapping[str, Any], path: str) -> object:
    """The claim of that name, or else of that path (`realm_access.roles`); None when there is none."""
    if path in claims:
        return claims[path]
    value: object = claims
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value
