"""The keys of an issuer, over HTTP: bounded in size and time, in a thread, no redirects.

issuer/.well-known/openid-configuration ─► "jwks_uri" ─► {"keys": [...]}
"""

import asyncio
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import IO, Any

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm

from rempart_platform.oidc.values import OidcConfig

_PIECE_BYTES = 64 * 1024


class IssuerError(Exception):
    """The issuer cannot be asked, or does not answer what it should."""


async def fetch_keys(config: OidcConfig) -> Mapping[str, jwt.PyJWK]:
    """Public keys that may sign tokens, by `kid`; "" for one without.

    Raises:
        IssuerError: there is none.
    """
    return await asyncio.to_thread(_fetch, config)


def _fetch(config: OidcConfig) -> Mapping[str, jwt.PyJWK]:
    return _parse(_get(config.jwks_url or _discover(config), config), config)


def _discover(config: OidcConfig) -> str:
    document = _get(config.issuer.rstrip("/") + "/.well-known/openid-configuration", config)
    if document.get("issuer") != config.issuer:
        raise IssuerError(f"the discovery document is of {document.get('issuer')!r}, not of {config.issuer!r}")
    url = document.get("jwks_uri")
    # An issuer behind TLS does not send us to keys without it, let alone to a file.
    schemes = ("https://",) if config.issuer.startswith("https://") else ("https://", "http://")
    if not isinstance(url, str) or not url.startswith(schemes):
        raise IssuerError("the discovery document names no 'jwks_uri' that can be asked")
    return url


def _parse(document: Mapping[str, Any], config: OidcConfig) -> Mapping[str, jwt.PyJWK]:
    listed = document.get("keys")
    if not isinstance(listed, list):
        raise IssuerError("the document of keys has no 'keys'")
    if len(listed) > config.max_keys:
        raise IssuerError(f"the document has {len(listed)} keys, above oidc_max_keys, which is {config.max_keys}")
    keys = {}
    for each in listed:
        key = _key(each)
        if key is not None and key.algorithm_name in config.allowed:
            keys[key.key_id or ""] = key
    if not keys:
        raise IssuerError("the document has no key for any of oidc_algorithms")
    return keys


def _key(described: object) -> jwt.PyJWK | None:
    """None for what is no public key of a signature that we know; an issuer may have others."""
    if not isinstance(described, dict) or described.get("use", "sig") != "sig" or described.get("kty") == "oct":
        return None
    if not isinstance(described.get("kid", ""), str):
        return None
    public = {name: value for name, value in described.items() if name in _PUBLIC_PARTS}
    try:
        return jwt.PyJWK(public)
    except _NO_KEY:
        return None


_PUBLIC_PARTS = frozenset({"kty", "use", "kid", "alg", "n", "e", "crv", "x", "y"})
# Also of the algorithm "none", and of curves that this machine's OpenSSL does not have.
_NO_KEY = (jwt.PyJWTError, ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _get(url: str, config: OidcConfig) -> dict[str, Any]:
    deadline = time.monotonic() + config.fetch_timeout_s
    try:
        request = urllib.request.Request(url, headers={"accept": "application/json"})
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=config.fetch_timeout_s) as response:
            data = _read(response, deadline, config)
    except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError is of a URL that is none
        raise IssuerError(f"{url}: {error}") from error
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise IssuerError(f"{url} answers no JSON object")
    return document


def _read(response: http.client.HTTPResponse, deadline: float, config: OidcConfig) -> bytes:
    data = bytearray()
    while piece := response.read1(_PIECE_BYTES):
        data += piece
        if len(data) > config.max_document_bytes:
            raise IssuerError(f"the answer has more than oidc_max_document_bytes, {config.max_document_bytes} bytes")
        if time.monotonic() > deadline:
            raise IssuerError(f"the answer takes longer than oidc_fetch_timeout_s, {config.fetch_timeout_s} s")
    return bytes(data)
