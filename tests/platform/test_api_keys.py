import itertools
import random
from collections.abc import AsyncIterator, Iterator

import pytest

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyHasher
from rempart_platform.tenancy.authenticators import AdminAuthenticator, Authenticator
from rempart_platform.tenancy.limits import LimitChange, TenantLimits
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import away_after, own_redis, take_turns

HASHER = KeyHasher(b"a pepper of 16 bytes or more")


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


@pytest.fixture
def store(redis: RedisClient) -> ApiKeyStore:
    seconds: Iterator[int] = itertools.count(1_700_000_000)
    return ApiKeyStore(redis, HASHER, clock=lambda: float(next(seconds)))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def authenticator(store: ApiKeyStore, clock: ManualClock) -> Authenticator:
    return Authenticator(store, HASHER, cache_s=5.0, cache_capacity=3, clock=clock)


async def _refusal(authenticator: Authenticator, bearer: str) -> str:
    with pytest.raises(RempartError) as raised:
        await authenticator.authenticate(bearer)
    assert raised.value.kind is ErrorKind.INVALID_API_KEY
    return raised.value.message


def _another_secret(key: str) -> str:
    return key[:-1] + ("0" if key[-1] != "0" else "1")


async def test_issued_key_names_its_tenant(store: ApiKeyStore, authenticator: Authenticator) -> None:
    issued = await store.issue("acme")
    assert issued.key.startswith(f"rk_{issued.key_id}_")
    assert await authenticator.authenticate(issued.key) == Caller("acme", issued.key_id)


async def test_secret_has_256_bits_and_shows_in_no_repr(store: ApiKeyStore) -> None:
    first, second = await store.issue("acme"), await store.issue("acme")
    secret = first.key.rsplit("_", 1)[1]
    assert len(bytes.fromhex(secret)) == 32
    assert first.key != second.key
    assert secret not in repr(first)


async def test_redis_holds_no_secret(redis: RedisClient, store: ApiKeyStore) -> None:
    issued = await store.issue("acme")
    secret = issued.key.rsplit("_", 1)[1]
    for key in await redis.call(lambda each: each.keys("*")):
        if await redis.call(lambda each, key=key: each.type(key)) == "hash":  # type: ignore[misc]
            stored = await redis.read_hash(str(key))
            assert secret not in str(key) + str(stored)


async def test_unknown_wrong_malformed_and_revoked_keys_get_one_answer(
    store: ApiKeyStore, authenticator: Authenticator
) -> None:
    valid, revoked = await store.issue("acme"), await store.issue("acme")
    await store.revoke(revoked.key_id)
    bearers = [
        "rk_" + "0" * 16 + "_" + "0" * 64,
        _another_secret(valid.key),
        revoked.key,
        "",
        "rk_",
        valid.key + "0",
        valid.key.upper(),
        f"{valid.key}\n",
        "x" * 100_000,
        "\ud800",
    ]
    assert len({await _refusal(authenticator, bearer) for bearer in bearers}) == 1
    assert await authenticator.authenticate(valid.key) == Caller("acme", valid.key_id)


async def test_key_of_another_pepper_is_refused(store: ApiKeyStore) -> None:
    issued = await store.issue("acme")
    other = KeyHasher(b"some other pepper, as long")
    await _refusal(Authenticator(store, other), issued.key)


async def test_revoked_key_lives_no_longer_than_the_cache(
    store: ApiKeyStore, authenticator: Authenticator, clock: ManualClock
) -> None:
    issued = await store.issue("acme")
    await authenticator.authenticate(issued.key)
    clock.now += 3.0
    await authenticator.authenticate(issued.key)
    await store.revoke(issued.key_id)
    clock.now += 1.9
    await authenticator.authenticate(issued.key)  # Remembered since the first time, and no use prolongs it.
    clock.now += 0.1
    await _refusal(authenticator, issued.key)


async def test_remembered_key_is_still_compared(store: ApiKeyStore, authenticator: Authenticator) -> None:
    issued = await store.issue("acme")
    await authenticator.authenticate(issued.key)
    await _refusal(authenticator, _another_secret(issued.key))


async def test_remembered_keys_ask_redis_nothing(
    store: ApiKeyStore, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await store.issue("acme")
    unknown = "rk_" + "0" * 16 + "_" + "0" * 64
    await authenticator.authenticate(issued.key)
    await _refusal(authenticator, unknown)
    monkeypatch.delattr(ApiKeyStore, "find")
    await authenticator.authenticate(issued.key)
    await _refusal(authenticator, unknown)


async def test_expired_key_gets_the_answer_of_an_unknown_one_also_while_it_is_remembered(store: ApiKeyStore) -> None:
    wall = ManualClock()
    wall.now = 1_800_000_000.0
    authenticator = Authenticator(store, HASHER, clock=ManualClock(), wall_clock=wall)
    issued = await store.issue("acme", expires_s=1_800_000_010)
    forever = await store.issue("acme")
    wall.now += 9.9
    await authenticator.authenticate(issued.key)
    wall.now += 0.1
    unknown = "rk_" + "0" * 16 + "_" + "0" * 64
    assert await _refusal(authenticator, issued.key) == await _refusal(authenticator, unknown)
    await authenticator.authenticate(forever.key)
    assert [key.expires_s for key in await store.list("acme")] == [1_800_000_010, 0]


async def test_expiry_can_be_moved_and_taken_back(store: ApiKeyStore) -> None:
    issued = await store.issue("acme", expires_s=1_800_000_010)
    assert (await store.set_expiry(issued.key_id, 1_900_000_000)).expires_s == 1_900_000_000
    assert (await store.set_expiry(issued.key_id, 0)).expires_s == 0
    for attempt in (store.issue("acme", expires_s=5), store.set_expiry(issued.key_id, 5)):
        with pytest.raises(RempartError) as raised:
            await attempt
        assert (raised.value.kind, raised.value.param) == (ErrorKind.INVALID_REQUEST, "expires_s")
    await store.revoke(issued.key_id)
    with pytest.raises(RempartError):
        await store.set_expiry(issued.key_id, 0)


async def test_key_that_is_revoked_while_its_expiry_is_set_leaves_nothing(redis: RedisClient) -> None:
    for order in range(20):
        issued = await ApiKeyStore(redis, HASHER).issue("acme")
        await take_turns(
            redis,
            random.Random(order),
            lambda redis, key_id=issued.key_id: ApiKeyStore(redis, HASHER).revoke(key_id),  # type: ignore[misc]
            lambda redis, key_id=issued.key_id: ApiKeyStore(redis, HASHER).set_expiry(key_id, 0),  # type: ignore[misc]
        )
        assert await redis.call(lambda redis: redis.keys("*")) == []


async def test_flood_of_guesses_pushes_out_no_real_key_and_takes_bounded_memory(
    store: ApiKeyStore, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await store.issue("acme")
    await authenticator.authenticate(issued.key)
    for guess in range(20):
        await _refusal(authenticator, f"rk_{guess:016x}_" + "0" * 64)
    assert authenticator.num_remembered == 1 + 3
    monkeypatch.delattr(ApiKeyStore, "find")
    await authenticator.authenticate(issued.key)


async def test_list_is_in_order_of_creation_and_without_revoked_keys(store: ApiKeyStore) -> None:
    issued = [await store.issue("acme") for _ in range(3)]
    await store.issue("other")
    revoked = await store.revoke(issued[1].key_id)
    assert revoked.tenant == "acme"
    listed = await store.list("acme")
    assert [key.key_id for key in listed] == [issued[0].key_id, issued[2].key_id]
    assert [key.created_s for key in listed] == [1_700_000_000, 1_700_000_002]
    assert await store.list("nobody") == ()


@pytest.mark.parametrize("key_id", ["", "0" * 16, "*", "x" * 1000])
async def test_key_that_is_not_there_cannot_be_revoked(store: ApiKeyStore, key_id: str) -> None:
    with pytest.raises(RempartError) as raised:
        await store.revoke(key_id)
    assert raised.value.kind is ErrorKind.NOT_FOUND


async def test_revoking_twice_says_not_found(store: ApiKeyStore) -> None:
    issued = await store.issue("acme")
    await store.revoke(issued.key_id)
    with pytest.raises(RempartError) as raised:
        await store.revoke(issued.key_id)
    assert raised.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize("num_calls", range(1, 5))
async def test_revocation_that_was_cut_short_holds_and_is_ended_by_the_next(
    redis: RedisClient, store: ApiKeyStore, authenticator: Authenticator, num_calls: int
) -> None:
    tenants = TenantRegistry(redis)
    await tenants.create("acme", TenantLimits())
    issued = await store.issue("acme")
    await tenants.change("acme", LimitChange(TenantLimits(concurrency=1), key_id=issued.key_id))
    with pytest.raises(RedisAwayError), away_after(redis, num_calls):
        await store.revoke(issued.key_id)
    if num_calls > 1:
        await _refusal(authenticator, issued.key)
        assert await store.list("acme") == ()
    assert (await store.revoke(issued.key_id)).tenant == "acme"
    await _refusal(authenticator, issued.key)
    keys = await redis.call(lambda redis: redis.keys("*"))
    assert sorted(keys) == ["rempart:tenants", "rempart:{acme}:tenant"]
    assert list(await redis.read_hash("rempart:{acme}:tenant")) == ["created_s"]


async def test_admin_key_passes_and_all_else_is_refused() -> None:
    admin = AdminAuthenticator("an admin key, long enough")
    assert await admin.authenticate("an admin key, long enough") == "admin key"
    for bearer in ("", "an admin key, long enougi", "an admin key, long enough ", "é"):
        with pytest.raises(RempartError) as raised:
            await admin.authenticate(bearer)
        assert raised.value.kind is ErrorKind.INVALID_API_KEY


def test_guessable_secrets_of_the_operator_are_refused() -> None:
    with pytest.raises(ValueError, match="admin key"):
        AdminAuthenticator("")
    with pytest.raises(ValueError, match="pepper"):
        KeyHasher(b"short")
