"""API keys: a bearer token that says which tenant asks.

    rk_<key id>_<secret>        key id: 64 random bits, kept in the clear; secret: 256 random bits, kept by the tenant

Kept is HMAC-SHA-256(pepper, whole key). The secret is random, so no slow hash is needed, and without the pepper, which
is not in Redis, the digests serve no one.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.keyspace import TenantKeys, api_key_record
from rempart_platform.tenancy.limits import LIMITS, LimitChange
from rempart_platform.tenancy.records import FieldChange, change_record
from rempart_platform.tenancy.redis_client import RedisClient

_KEY_ID = re.compile(r"[0-9a-f]{16}")
_KEY = re.compile(r"rk_([0-9a-f]{16})_[0-9a-f]{64}")
MIN_PEPPER_BYTES = 16


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    key_id: str
    tenant: str
    created_s: int
    expires_s: int = 0
    """Seconds since the epoch; 0 for never."""


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key with its secret, which is shown this once."""

    key_id: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key."""

    tenant: str
    digest: str = field(repr=False)
    expires_s: int = 0


class KeyHasher:
    """Digests of keys under the pepper.

    Raises:
        ValueError: a pepper so short that it could be guessed.
    """

    def __init__(self, pepper: bytes) -> None:
        if len(pepper) < MIN_PEPPER_BYTES:
            raise ValueError(f"the pepper of API keys needs at least {MIN_PEPPER_BYTES} bytes")
        self._pepper = pepper

    def digest(self, key: str) -> str:
        return hmac.digest(self._pepper, key.encode(), "sha256").hex()


class ApiKeyStore:
    """Issues, lists and revokes keys. The caller has checked that the tenant exists.

    Raises:
        RempartError: NOT_FOUND for a key that is not there; UNAVAILABLE when Redis does not answer.
    """

    def __init__(self, redis: RedisClient, hasher: KeyHasher, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._hasher = hasher
        self._clock = clock

    async def issue(self, tenant: str, expires_s: int = 0) -> IssuedKey:
        """Makes a key, which ends by itself at `expires_s`; 0 for never."""
        self._check_expiry(expires_s)
        key_id = secrets.token_hex(8)
        key = f"rk_{key_id}_{secrets.token_hex(32)}"
        await self._write(tenant, key_id, key, expires_s)
        return IssuedKey(key_id, key)

    async def _write(self, tenant: str, key_id: str, key: str, expires_s: int) -> None:
        created_s = int(self._clock())
        record = {"tenant": tenant, "digest": self._hasher.digest(key), "created_s": str(created_s)}
        record |= {"expires_s": str(expires_s)} if expires_s else {}
        # Listed first and made valid second: no crash leaves a valid key that is in no list.
        await self._redis.call(lambda redis: redis.zadd(TenantKeys(tenant).api_keys, {key_id: created_s}))
        await self._redis.write_hash(api_key_record(key_id), record)

    def describe(self, key: str) -> str:
        """Its id, and what changes with its secret and tells nothing of it."""
        return f"{key_id_of(key)} {self._hasher.digest(key)}"

    async def adopt(self, tenant: str, key: str) -> str:
        """Makes a key valid that was made elsewhere, in the form of `issue`. Again is harmless. Returns its id.

        Raises:
            RempartError: INVALID_REQUEST when it has another form; ALREADY_EXISTS when its id is another tenant's.
        """
        key_id = key_id_of(key)
        if key_id is None:
            text = "A key is 'rk_', 16 hexadecimal digits, '_' and 64 of them, all in lower case."
            raise RempartError(ErrorKind.INVALID_REQUEST, text, param="key")
        known = await self.find(key_id)
        if known is not None and known.tenant != tenant:
            raise RempartError(ErrorKind.ALREADY_EXISTS, f"The key {key_id} is another tenant's.", param="key")
        await self._write(tenant, key_id, key, expires_s=0)
        return key_id

    async def list(self, tenant: str) -> tuple[ApiKey, ...]:
        """Valid keys of a tenant, in order of creation."""
        key_ids = await self._redis.call(lambda redis: redis.zrange(TenantKeys(tenant).api_keys, 0, -1))
        keys = [await self._load(str(key_id)) for key_id in key_ids]
        return tuple(key for key in keys if key is not None)

    async def get(self, key_id: str) -> ApiKey:
        key = await self._load(key_id) if is_key_id(key_id) else None
        if key is None:
            raise _no_such_key()
        return key

    async def set_expiry(self, key_id: str, expires_s: int) -> ApiKey:
        """Changes when a key ends by itself; 0 for never. Noticed as a revocation is."""
        self._check_expiry(expires_s)
        await self.get(key_id)
        await change_record(self._redis, api_key_record(key_id), [FieldChange({"expires_s": expires_s})])
        return await self.get(key_id)

    async def revoke(self, key_id: str) -> ApiKey:
        """Ends a key and its limits: here at once, in every `Authenticator` when its memory of it ends."""
        stored = await self._redis.read_hash(api_key_record(key_id)) if is_key_id(key_id) else {}
        if "tenant" not in stored:
            raise _no_such_key()
        key, keys = _parse(key_id, stored), TenantKeys(stored["tenant"])
        limits = LimitChange(unset=LIMITS, key_id=key_id).removed()
        # Made invalid first and forgotten last: whoever comes after a crash in between ends what is left.
        await self._redis.call(lambda redis: redis.hdel(api_key_record(key_id), "digest"))
        await self._redis.call(lambda redis: redis.hdel(keys.tenant, *limits))
        await self._redis.call(lambda redis: redis.zrem(keys.api_keys, key_id))
        await self._redis.call(lambda redis: redis.delete(api_key_record(key_id)))
        return key

    async def find(self, key_id: str) -> KeyRecord | None:
        stored = await self._redis.read_hash(api_key_record(key_id))
        return KeyRecord(stored["tenant"], stored["digest"], _expiry(stored)) if "digest" in stored else None

    async def _load(self, key_id: str) -> ApiKey | None:
        stored = await self._redis.read_hash(api_key_record(key_id))
        # Without a digest it is being revoked.
        return _parse(key_id, stored) if "digest" in stored else None

    def _check_expiry(self, expires_s: int) -> None:
        if expires_s and expires_s <= self._clock():
            raise RempartError(ErrorKind.INVALID_REQUEST, "'expires_s' must lie in the future.", param="expires_s")


def key_id_of(key: str) -> str | None:
    """The id in a key; None when it has not the form of one."""
    found = _KEY.fullmatch(key)
    return found.group(1) if found else None


def is_key_id(text: str) -> bool:
    """Whether a caller's `key_id` is that of a key of ours."""
    return _KEY_ID.fullmatch(text) is not None


def _parse(key_id: str, stored: Mapping[str, str]) -> ApiKey:
    return ApiKey(key_id, stored["tenant"], int(stored["created_s"]), _expiry(stored))


def _no_such_key() -> RempartError:
    return RempartError(ErrorKind.NOT_FOUND, "There is no such key.", param="key_id")


def _expiry(stored: Mapping[str, str]) -> int:
    return int(stored.get("expires_s", "0"))
