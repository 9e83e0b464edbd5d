"""Tokens of an issuer: a real one on a port of its own, with real signatures."""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.apis.grpc import InferenceServicer
from rempart_platform.apis.services import ApiServices
from rempart_platform.apis.testing import (
    CALLER,
    KEY,
    MODEL,
    FakeAuthenticator,
    FakeDispatcher,
    fake_services,
    serve_http,
)
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller
from rempart_platform.oidc.authenticator import (
    EitherAdminAuthenticator,
    EitherAuthenticator,
    TenantMemory,
    TokenAuthenticator,
    is_token,
)
from rempart_platform.oidc.fetch import IssuerError, fetch_keys
from rempart_platform.oidc.keys import KeyRing, open_key_ring
from rempart_platform.oidc.testing import AUDIENCE, Issuer, local_issuer, new_key, to_jwk
from rempart_platform.oidc.tokens import TokenVerifier, claim
from rempart_platform.oidc.values import OidcConfig
from rempart_platform.tenancy.authenticators import AdminAuthenticator
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import own_redis
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc

RSA, OTHER_RSA = new_key("RS256"), new_key("RS256")
KEYS = {"rsa": RSA, "ec": new_key("ES256"), "ed": new_key("EdDSA")}
DISCOVERY = "/.well-known/openid-configuration"
ADMIN_KEY = "an admin key.with.dots"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with local_issuer() as issuer:
        issuer.keys.update(KEYS)
        yield issuer


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Tenants:
    """Knows one, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_away = False

    async def get(self, name: str) -> object:
        self.asked.append(name)
        if self.is_away:
            raise RempartError(ErrorKind.UNAVAILABLE, "Redis is away")
        if name != "acme":
            raise RempartError(ErrorKind.NOT_FOUND, "There is no such tenant.")
        return name


@dataclass
class Rig:
    config: OidcConfig
    clock: Clock = field(default_factory=Clock)
    wall_clock: Clock = field(default_factory=lambda: Clock(time.time()))
    tenants: Tenants = field(default_factory=Tenants)

    def __post_init__(self) -> None:
        self.ring = KeyRing(self.config, lambda: fetch_keys(self.config), self.clock)
        self.verifier = TokenVerifier(self.config, self.ring, clock=self.clock, wall_clock=self.wall_clock)
        memory = TenantMemory(self.tenants, self.config.memory_s, self.clock)  # type: ignore[arg-type]
        self.authenticator = TokenAuthenticator(self.config, self.verifier, memory)

    async def refusal(self, token: str) -> RempartError:
        with pytest.raises(RempartError) as raised:
            await self.authenticator.authenticate(token)
        return raised.value


def config_of(issuer: Issuer, **changes: Any) -> OidcConfig:
    return replace(OidcConfig(issuer=issuer.url, audience=AUDIENCE), **changes)


@pytest.fixture
def rig(issuer: Issuer) -> Rig:
    return Rig(config_of(issuer))


@pytest.mark.parametrize(("kid", "algorithm"), [("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")])
async def test_a_token_says_which_tenant_asks(issuer: Issuer, rig: Rig, kid: str, algorithm: str) -> None:
    caller = await rig.authenticator.authenticate(issuer.token(kid, algorithm))
    digest = hashlib.sha256(f"{issuer.url}\0ada".encode()).hexdigest()[:16]
    assert caller == Caller("acme", f"oidc:{digest}")
    again = await rig.authenticator.authenticate(issuer.token(kid, algorithm, aud=["x", AUDIENCE], sub="bob"))
    assert again.key_id != caller.key_id
    assert rig.tenants.asked == ["acme"]
    assert issuer.asked == [DISCOVERY, "/keys"]


def _segment(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _unsigned(issuer: Issuer) -> str:
    return f"{_segment({'alg': 'none', 'kid': 'rsa'})}.{_segment(issuer.claims())}."


def _signed_with_the_public_key(issuer: Issuer) -> str:
    """What a verifier takes for HMAC's secret if it lets the token choose the algorithm."""
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = f"{_segment({'alg': 'HS256', 'kid': 'rsa'})}.{_segment(issuer.claims())}"
    signature = hmac.digest(pem, signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _changed(issuer: Issuer) -> str:
    header, _, signature = issuer.token("rsa").split(".")
    return f"{header}.{_segment(issuer.claims(tenant='other'))}.{signature}"


def _by(key: Any, algorithm: str, **header: object) -> Callable[[Issuer], str]:
    return lambda issuer: jwt.encode(issuer.claims(), key, algorithm, headers={"kid": "rsa", **header})


def _with(**claims: Any) -> Callable[[Issuer], str]:
    return lambda issuer: issuer.token("rsa", **claims)


INVALID: dict[str, Callable[[Issuer], str]] = {
    "expired": _with(exp=int(time.time()) - 60),
    "not yet valid": _with(nbf=int(time.time()) + 3600),
    "issued in the future": _with(iat=int(time.time()) + 3600),
    "of another audience": _with(aud="another"),
    "of no audience": _with(aud=None),
    "of another issuer": _with(iss="https://elsewhere"),
    "of no issuer": _with(iss=None),
    "without an end": _with(exp=None),
    "with an endless end": _with(exp=math.inf),
    "of nobody": _with(sub=None),
    "of an empty subject": _with(sub=""),
    "of a subject that is a number": _with(sub=7),
    "of a subject that is no text": _with(sub="\ud800"),
    "of a subject that a terminal obeys": _with(sub="ada\x1b[2J\n"),
    "without a tenant": _with(tenant=None),
    "of a tenant that is not there": _with(tenant="nobody"),
    "of a tenant that is no name": _with(tenant=["acme"]),
    "unsigned": _unsigned,
    "signed with the public key": _signed_with_the_public_key,
    "changed": _changed,
    "of a forger": _by(OTHER_RSA, "RS256"),
    "of an algorithm that is not allowed": _by(RSA, "RS512"),
    "of another algorithm than its key": _by(KEYS["ec"], "ES256"),
    "of an unknown key": _by(RSA, "RS256", kid="unknown"),
    "with a header it insists on": _by(RSA, "RS256", crit=["x"], x=1),
    "huge": _with(padding="x" * 10_000),
    "deep": lambda issuer: f"{base64.urlsafe_b64encode(b'[' * 6000).decode()}.e30.e30",
    "garbage": lambda issuer: "a.b.c",
    "empty": lambda issuer: "..",
}


@pytest.mark.parametrize("make", INVALID.values(), ids=INVALID)
async def test_whatever_is_not_valid_gets_one_and_the_same_answer(
    issuer: Issuer, rig: Rig, make: Callable[[Issuer], str]
) -> None:
    await rig.authenticator.authenticate(issuer.token("rsa"))
    error = await rig.refusal(make(issuer))
    assert (error.kind, error.message) == (ErrorKind.INVALID_API_KEY, "The API key is not valid.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
HEADERS = st.fixed_dictionaries({}, optional={"alg": JSON, "kid": JSON, "b64": JSON, "crit": JSON, "typ": JSON})


@given(st.one_of(JSON, HEADERS).map(_segment) | st.text(max_size=50), st.sampled_from(["e30", "", "!"]))
def test_no_header_does_more_than_not_being_valid(header: str, rest: str) -> None:
    class NoKeys:
        async def find(self, kid: str) -> None:
            assert isinstance(kid, str)

    verifier = TokenVerifier(OidcConfig(issuer="https://x", audience="y"), NoKeys())
    with pytest.raises(RempartError, match="The API key is not valid"):
        asyncio.run(verifier.claims(f"{header}.{rest}.{rest}"))


async def test_clocks_may_differ_a_little(issuer: Issuer, rig: Rig) -> None:
    now_s = int(time.time())
    await rig.authenticator.authenticate(issuer.token("rsa", exp=now_s - 5, nbf=now_s + 15, iat=now_s + 15))


async def test_a_token_without_kid_is_of_the_key_without_one(issuer: Issuer) -> None:
    issuer.answers["/keys"] = json.dumps({"keys": [to_jwk(RSA)]}).encode()
    await Rig(config_of(issuer)).authenticator.authenticate(jwt.encode(issuer.claims(), RSA, "RS256"))


async def test_redis_away_is_no_verdict(issuer: Issuer, rig: Rig) -> None:
    rig.tenants.is_away = True
    assert (await rig.refusal(issuer.token("rsa"))).kind is ErrorKind.UNAVAILABLE


async def test_that_a_tenant_exists_is_remembered_for_a_moment(issuer: Issuer, rig: Rig) -> None:
    for _ in range(3):
        await rig.authenticator.authenticate(issuer.token("rsa"))
        await rig.refusal(issuer.token("rsa", tenant="nobody"))
    assert rig.tenants.asked == ["acme", "nobody"]
    rig.clock.now_s += 5.0
    await rig.authenticator.authenticate(issuer.token("rsa"))
    assert rig.tenants.asked == ["acme", "nobody", "acme"]


async def test_a_valid_token_is_remembered_for_a_moment_and_not_beyond_its_end(issuer: Issuer) -> None:
    asked: list[str] = []

    class Keys:
        async def find(self, kid: str) -> jwt.PyJWK:
            asked.append(kid)
            return jwt.PyJWK(to_jwk(RSA))

    token = issuer.token("rsa")
    clock, wall_clock = Clock(), Clock(time.time())
    verifier = TokenVerifier(config_of(issuer), Keys(), clock=clock, wall_clock=wall_clock)
    assert [(await verifier.claims(token))["sub"] for _ in range(3)] == ["ada"] * 3
    assert len(asked) == 1
    clock.now_s += 5.0
    await verifier.claims(token)
    assert len(asked) == 2
    wall_clock.now_s += 631.0
    await verifier.claims(token)
    assert len(asked) == 3


async def test_keys_that_the_issuer_changes_are_noticed(issuer: Issuer, rig: Rig) -> None:
    await rig.authenticator.authenticate(issuer.token("rsa"))
    old = issuer.token("rsa")
    issuer.keys["new"] = issuer.keys.pop("rsa")
    new = issuer.token("new")
    await rig.authenticator.authenticate(old)  # its key may be withdrawn, which nobody has told yet
    await rig.refusal(new)
    rig.clock.now_s += rig.config.min_refresh_s
    await rig.authenticator.authenticate(new)
    await rig.refusal(old)


async def test_a_flood_of_unknown_keys_is_no_flood_for_the_issuer(issuer: Issuer, rig: Rig) -> None:
    await rig.authenticator.authenticate(issuer.token("rsa"))
    flood = [_by(RSA, "RS256", kid=f"unknown-{number}")(issuer) for number in range(50)]
    for num_fetches in (1, 2):
        errors = await asyncio.gather(*map(rig.refusal, flood))
        assert {error.kind for error in errors} == {ErrorKind.INVALID_API_KEY}
        assert issuer.num_fetches == num_fetches
        rig.clock.now_s += rig.config.min_refresh_s


async def test_an_algorithm_that_is_not_allowed_asks_for_no_key(issuer: Issuer, rig: Rig) -> None:
    await rig.refusal(_signed_with_the_public_key(issuer))
    assert issuer.asked == []


async def test_known_keys_outlive_their_issuer_for_a_while(issuer: Issuer, rig: Rig) -> None:
    token = issuer.token("rsa")
    await rig.authenticator.authenticate(token)
    issuer.answers["/keys"] = None
    rig.clock.now_s += rig.config.max_key_age_s
    await rig.authenticator.authenticate(token)
    assert (await rig.refusal(_by(RSA, "RS256", kid="unknown")(issuer))).kind is ErrorKind.INVALID_API_KEY
    rig.clock.now_s += 20.0
    error = await rig.refusal(token)
    assert (error.kind, error.retry_after_s) == (ErrorKind.UNAVAILABLE, rig.config.min_refresh_s)
    del issuer.answers["/keys"]
    assert (await rig.refusal(token)).kind is ErrorKind.UNAVAILABLE  # it was asked a moment ago
    rig.clock.now_s += rig.config.min_refresh_s
    await rig.authenticator.authenticate(token)


async def test_a_router_may_start_before_its_issuer(issuer: Issuer, rig: Rig) -> None:
    issuer.answers[DISCOVERY] = None
    assert (await rig.refusal(issuer.token("rsa"))).kind is ErrorKind.UNAVAILABLE


async def test_keys_are_renewed_in_the_background(issuer: Issuer) -> None:
    config, num_fetches, renewed = config_of(issuer, refresh_s=0.01, min_refresh_s=0.005), 0, asyncio.Event()

    async def fetch() -> Mapping[str, jwt.PyJWK]:
        nonlocal num_fetches
        num_fetches += 1
        if num_fetches == 2:
            raise IssuerError("away for once")
        if num_fetches == 4:
            renewed.set()
        return await fetch_keys(config)

    ring = KeyRing(config, fetch, time.monotonic)
    running = asyncio.create_task(ring.run())
    await asyncio.wait_for(renewed.wait(), 20)
    running.cancel()
    await ring.close()
    assert await ring.find("rsa") is not None


async def test_leaving_does_not_wait_for_an_issuer_that_hangs(issuer: Issuer) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def fetch() -> dict[str, jwt.PyJWK]:
        asked.set()
        await go_on.wait()
        return {}

    ring = KeyRing(config_of(issuer), fetch, Clock())
    finding = asyncio.create_task(ring.find("rsa"))
    await asyncio.wait_for(asked.wait(), 10)
    await asyncio.wait_for(ring.close(), 10)
    with pytest.raises(asyncio.CancelledError):
        await finding


def _document(**values: object) -> bytes:
    return json.dumps(values).encode()


BAD_ANSWERS: dict[str, tuple[str, bytes | None, str]] = {
    "an error": (DISCOVERY, None, "500"),
    "no JSON": (DISCOVERY, b"<html>", "no JSON object"),
    "no object": (DISCOVERY, b"[]", "no JSON object"),
    "deep JSON": (DISCOVERY, b"[" * 100_000, "no JSON object"),
    "another issuer": (DISCOVERY, _document(issuer="https://elsewhere", jwks_uri="x"), "is of 'https://elsewhere'"),
    "too much": ("/keys", b" " * 300_000, "oidc_max_document_bytes"),
    "no list": ("/keys", _document(keys={}), "has no 'keys'"),
    "no keys": ("/keys", _document(keys=[]), "no key for any"),
    "too many keys": ("/keys", _document(keys=[{}] * 65), "oidc_max_keys, which is 64"),
    "a secret alone": (
        "/keys",
        _document(keys=[{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "kid": "rsa"}]),
        "no key",
    ),
    "broken keys alone": (
        "/keys",
        _document(keys=[1, None, {"kty": "RSA", "n": 1}, {"kty": "EC", "x": "!"}]),
        "no key",
    ),
    "keys for encryption": ("/keys", _document(keys=[to_jwk(RSA, use="enc", kid="rsa")]), "no key"),
    "keys of no allowed algorithm": ("/keys", _document(keys=[to_jwk(RSA, alg="RS512", kid="rsa")]), "no key"),
}


@pytest.mark.parametrize(("path", "answer", "said"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
async def test_what_an_issuer_may_not_answer(issuer: Issuer, path: str, answer: bytes | None, said: str) -> None:
    issuer.answers[path] = answer
    with pytest.raises(IssuerError, match=said):
        await fetch_keys(config_of(issuer))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "http://[", "", None])
async def test_keys_are_fetched_over_http_alone(issuer: Issuer, url: str | None) -> None:
    issuer.answers[DISCOVERY] = _document(issuer=issuer.url, jwks_uri=url)
    with pytest.raises(IssuerError):
        await fetch_keys(config_of(issuer))
    assert issuer.asked == [DISCOVERY]


ODD_KEYS: dict[str, dict[str, object]] = {
    "unsigned": {"kty": "RSA", "alg": "none", "kid": "odd"},
    "of a kid that is a list": to_jwk(RSA, kid=["odd"]),
    "of an algorithm that is a list": to_jwk(RSA, alg=["RS256"]),
    "of a curve that is a list": {"kty": "OKP", "crv": ["Ed25519"], "x": "AA"},
    "of numbers that are none": {"kty": "RSA", "n": "!", "e": "AQAB"},
}


@pytest.mark.parametrize("odd", ODD_KEYS.values(), ids=ODD_KEYS)
async def test_an_odd_key_does_not_keep_the_others_away(issuer: Issuer, odd: dict[str, object]) -> None:
    issuer.answers["/keys"] = _document(keys=[odd, to_jwk(RSA, kid="rsa")])
    assert list(await fetch_keys(config_of(issuer))) == ["rsa"]


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
async def test_a_key_so_short_that_it_can_be_broken_signs_nothing(issuer: Issuer) -> None:
    issuer.keys["short"] = generate_private_key(65537, 1024)
    assert (await Rig(config_of(issuer)).refusal(issuer.token("short"))).kind is ErrorKind.INVALID_API_KEY


async def test_redirects_are_not_followed(issuer: Issuer) -> None:
    issuer.redirects["/keys"] = f"{issuer.url}/elsewhere"
    with pytest.raises(IssuerError, match="302"):
        await fetch_keys(config_of(issuer))
    assert "/elsewhere" not in issuer.asked


async def test_an_answer_without_end_is_given_up(issuer: Issuer) -> None:
    issuer.trickles.add("/keys")
    with pytest.raises(IssuerError, match="oidc_fetch_timeout_s"):
        await fetch_keys(config_of(issuer, fetch_timeout_s=0.1))


async def test_an_issuer_that_is_not_there(issuer: Issuer) -> None:
    with pytest.raises(IssuerError, match="refused"):
        await fetch_keys(config_of(issuer, jwks_url="http://127.0.0.1:9/keys"))


async def test_the_keys_url_can_be_given(issuer: Issuer) -> None:
    keys = await fetch_keys(config_of(issuer, jwks_url=f"{issuer.url}/keys"))
    assert sorted(keys) == ["ec", "ed", "rsa"]
    assert issuer.asked == ["/keys"]


async def test_a_key_of_ours_goes_to_the_keys_and_a_token_to_the_issuer(issuer: Issuer, rig: Rig) -> None:
    either = EitherAuthenticator(FakeAuthenticator(), rig.authenticator)
    assert await either.authenticate(KEY) == CALLER
    assert (await either.authenticate(issuer.token("rsa"))).tenant == "acme"
    assert not is_token("rk_0123456789abcdef_a.b.c")
    for bearer in ("", "rk_a.b.c", "a.b", "a.b.c"):
        with pytest.raises(RempartError, match="not valid"):
            await either.authenticate(bearer)


ROLES = [
    ("roles", {"roles": ["reader", "rempart-admin"]}),
    ("roles", {"roles": "reader rempart-admin"}),
    ("realm_access.roles", {"realm_access": {"roles": ["rempart-admin"]}}),
    ("https://rempart/roles", {"https://rempart/roles": ["rempart-admin"]}),
]


@pytest.mark.parametrize(("path", "claims"), ROLES)
async def test_who_has_the_role_is_an_admin_and_is_named(issuer: Issuer, path: str, claims: dict[str, Any]) -> None:
    rig = Rig(config_of(issuer, admin_role="rempart-admin", roles_claim=path))
    admin = EitherAdminAuthenticator(AdminAuthenticator(ADMIN_KEY), rig.verifier, rig.config)
    assert await admin.authenticate(issuer.token("rsa", **claims)) == "oidc:ada"
    assert await admin.authenticate(ADMIN_KEY) == "admin key"
    for other in (
        {},
        {"roles": ["reader"]},
        {"roles": {"rempart-admin": 1}},
        {"roles": 7},
        {"roles": "rempart-admins"},
    ):
        with pytest.raises(RempartError, match="not valid"):
            await admin.authenticate(issuer.token("rsa", **other))


async def test_without_a_role_no_token_is_an_admins(issuer: Issuer, rig: Rig) -> None:
    admin = EitherAdminAuthenticator(AdminAuthenticator(ADMIN_KEY), rig.verifier, rig.config)
    with pytest.raises(RempartError, match="not valid"):
        await admin.authenticate(issuer.token("rsa", roles=[""]))


def test_claims_are_found_by_name_before_path() -> None:
    assert claim({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert claim({"a": {"b": 2}}, "a.b") == 2
    assert claim({"a": 3}, "a.b") is None


WRONG = [
    ({"audience": ""}, "--oidc-audience"),
    ({"issuer": "ftp://x"}, "--oidc-issuer"),
    ({"jwks_url": "file:///x"}, "--oidc-jwks-url"),
    ({"algorithms": "RS256,none"}, "--oidc-algorithms"),
    ({"algorithms": "HS256"}, "--oidc-algorithms"),
    ({"algorithms": ""}, "--oidc-algorithms"),
    ({"tenant_claim": ""}, "--oidc-tenant-claim"),
    ({"min_refresh_s": 0.0}, "min_refresh_s must be above 0"),
    ({"max_key_age_s": 599.0}, "--oidc-max-key-age-s"),
]


@pytest.mark.parametrize(("changes", "flag"), WRONG)
def test_settings_that_are_unsafe_are_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        replace(OidcConfig(issuer="https://x", audience="y"), **changes)


async def test_a_tenant_of_a_token_is_one_of_ours(issuer: Issuer) -> None:
    async with own_redis() as redis:
        registry = TenantRegistry(redis)
        await registry.create("acme", TenantLimits())
        config = config_of(issuer)
        async with open_key_ring(config) as ring:
            tokens = TokenAuthenticator(config, TokenVerifier(config, ring), TenantMemory(registry, 5.0))
            assert (await tokens.authenticate(issuer.token("rsa"))).tenant == "acme"
            for tenant in ("nobody", "{acme}", "acme:tenant", "a" * 1000, "ACME", ""):
                with pytest.raises(RempartError, match="The API key is not valid"):
                    await tokens.authenticate(issuer.token("rsa", tenant=tenant))


def _services(rig: Rig, dispatcher: FakeDispatcher) -> ApiServices:
    return replace(fake_services(dispatcher), authenticator=EitherAuthenticator(FakeAuthenticator(), rig.authenticator))


async def test_over_http(issuer: Issuer, rig: Rig) -> None:
    dispatcher = FakeDispatcher()
    async with serve_http(_services(rig, dispatcher)) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def ask(bearer: str) -> httpx.Response:
            body = {"model": MODEL, "prompt": "x"}
            return await http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {bearer}"})

        answers = [await ask(bearer) for bearer in (issuer.token("ec", "ES256"), KEY, _unsigned(issuer), "rk_wrong")]
        assert [answer.status_code for answer in answers] == [200, 200, 401, 401]
        assert answers[2].json() == answers[3].json()
        assert dispatcher.requests[0].caller.tenant == "acme"
        assert dispatcher.requests[0].caller.key_id.startswith("oidc:")
        issuer.answers[DISCOVERY] = None
        rig.clock.now_s += rig.config.max_key_age_s + 1
        away = await ask(issuer.token("ec", "ES256"))
        assert (away.status_code, away.headers["retry-after"]) == (503, "10")
        assert (await ask(KEY)).status_code == 200


@asynccontextmanager
async def grpc_stub(services: ApiServices) -> AsyncIterator["inference_pb2_grpc.InferenceAsyncStub"]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(services), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        await server.stop(None)


async def test_over_grpc(issuer: Issuer, rig: Rig) -> None:
    async with grpc_stub(_services(rig, FakeDispatcher())) as stub:

        async def ask(bearer: str) -> inference_pb2.ListModelsResponse:
            metadata = (("authorization", f"Bearer {bearer}"),)
            return await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)

        assert (await ask(issuer.token("ed", "EdDSA"))).models[0].name == MODEL
        assert (await ask(KEY)).models[0].name == MODEL
        for bearer in (_changed(issuer), _unsigned(issuer)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(bearer)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert refused.value.details() == "The API key is not valid."
