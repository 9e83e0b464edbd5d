"""A bearer token → its claims, or the one answer to whatever is not valid."""

from collections.abc import Mapping
from typing import Any, Protocol

import jwt

from rempart_platform.oidc.values import OidcConfig
from rempart_platform.tenancy.api_keys import invalid_key

_REQUIRED = ["exp", "iss", "aud", "sub"]
# PyJWT's own, and what Python's JSON and numbers may raise for a document that was made to hurt.
_NOT_VALID = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)


class Keys(Protocol):
    """Where keys are found; `KeyRing` in production."""

    async def find(self, kid: str) -> jwt.PyJWK | None:
        """Raises RempartError UNAVAILABLE."""
        ...


class TokenVerifier:
    """Checks signature, algorithm, issuer, audience and times."""

    def __init__(self, config: OidcConfig, keys: Keys) -> None:
        self._config = config
        self._keys = keys

    async def claims(self, token: str) -> Mapping[str, Any]:
        """What the issuer says of the token's holder.

        Raises:
            RempartError: INVALID_API_KEY; UNAVAILABLE when the issuer's keys are needed and cannot be had.
        """
        if len(token) > self._config.max_token_bytes:
            raise invalid_key()
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
        if not claims["sub"]:
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
