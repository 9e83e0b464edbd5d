"""Who asks: the caller of an API key, and the operator with the admin key.

A key that is unknown, wrong, revoked or expired gets one and the same answer.
"""

import hmac
import secrets
import time
from collections.abc import Callable

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller
from rempart_platform.tenancy.api_keys import MIN_PEPPER_BYTES, ApiKeyStore, KeyHasher, KeyRecord, key_id_of
from rempart_platform.tenancy.memory import Memory

ADMIN_KEY_HOLDER = "admin key"


class Authenticator:
    """Bearer token → caller.

    Args:
        store: where keys are found.
        hasher: the same that issued them.
        cache_s: how long a key is remembered; a revoked key lives at most that long.
        cache_capacity: keys remembered; as many again that do not exist, apart, so that a flood of guesses cannot
            push out real ones.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch, for keys that expire.
    """

    def __init__(
        self,
        store: ApiKeyStore,
        hasher: KeyHasher,
        *,
        cache_s: float = 5.0,
        cache_capacity: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hasher = hasher
        self._clock = clock
        self._wall_clock = wall_clock
        self._known = Memory[str, KeyRecord | None](cache_capacity, cache_s, clock)
        self._unknown = Memory[str, KeyRecord | None](cache_capacity, cache_s, clock)
        self._no_record = KeyRecord("", hasher.digest(secrets.token_hex(32)))

    @property
    def num_remembered(self) -> int:
        return len(self._known) + len(self._unknown)

    async def authenticate(self, bearer: str) -> Caller:
        """The caller of a key, given without "Bearer ".

        Raises:
            RempartError: INVALID_API_KEY; UNAVAILABLE when Redis is needed and does not answer.
        """
        key_id = key_id_of(bearer)
        if key_id is None:
            raise invalid_key()
        record = await self._find(key_id)
        # Compared also when there is no record: the answer takes the same time.
        is_right = hmac.compare_digest((record or self._no_record).digest, self._hasher.digest(bearer))
        if record is None or not is_right or 0 < record.expires_s <= self._wall_clock():
            raise invalid_key()
        return Caller(record.tenant, key_id)

    async def _find(self, key_id: str) -> KeyRecord | None:
        remembered = self._known.get(key_id) or self._unknown.get(key_id)
        if remembered is not None:
            return remembered[0]
        asked_at = self._clock()
        record = await self._store.find(key_id)
        (self._known if record else self._unknown).put(key_id, record, asked_at)
        return record


class AdminAuthenticator:
    """Compares a bearer token with the one admin key.

    Raises:
        ValueError: an admin key so short that it could be guessed.
    """

    def __init__(self, admin_key: str) -> None:
        if len(admin_key) < MIN_PEPPER_BYTES:
            raise ValueError(f"the admin key needs at least {MIN_PEPPER_BYTES} characters")
        # Digests have one length, so that the comparison does not tell that of the key.
        self._hasher = KeyHasher(secrets.token_bytes(32))
        self._digest = self._hasher.digest(admin_key)

    async def authenticate(self, bearer: str) -> str:
        """Passes the admin key, given without "Bearer ", whose holder has no other name than `ADMIN_KEY_HOLDER`.

        Raises:
            RempartError: INVALID_API_KEY.
        """
        if not hmac.compare_digest(self._digest, self._hasher.digest(bearer)):
            raise invalid_key()
        return ADMIN_KEY_HOLDER


def invalid_key() -> RempartError:
    """The one answer to whatever is not valid: it tells nobody how near they are."""
    return RempartError(ErrorKind.INVALID_API_KEY, "The API key is not valid.")
