"""For tests of tokens: an issuer on a port of its own, which signs for real and can misbehave."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "rempart"
PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey


def new_key(algorithm: str) -> PrivateKey:
    """A key of RS256, ES256 or EdDSA."""
    match algorithm:
        case "RS256":
            return generate_rsa_key(65537, 2048)
        case "ES256":
            return generate_ec_key(SECP256R1())
        case _:
            return Ed25519PrivateKey.generate()


def to_jwk(key: PrivateKey, **fields: object) -> dict[str, object]:
    """The public half, as an issuer shows it."""
    if isinstance(key, RSAPrivateKey):
        described = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif isinstance(key, EllipticCurvePrivateKey):
        described = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        described = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**described, **fields}


@dataclass(slots=True)
class Issuer:
    """What it says. `answers` replaces what a path says: other bytes, or None for an answer of 500.

    `redirects` sends a path elsewhere; a path of `trickles` never comes to its end.
    """

    url: str
    keys: dict[str, PrivateKey] = field(default_factory=dict)
    answers: dict[str, bytes | None] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    trickles: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> bytes | None:
        self.asked.append(path)
        if path in self.answers:
            return self.answers[path]
        if path == "/.well-known/openid-configuration":
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/keys"}).encode()
        if path == "/keys":
            return json.dumps({"keys": [to_jwk(key, kid=kid) for kid, key in self.keys.items()]}).encode()
        return None

    @property
    def num_fetches(self) -> int:
        return self.asked.count("/keys")

    def claims(self, **changes: object) -> dict[str, Any]:
        """Valid ones; a change to None leaves a claim out."""
        now_s = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "iat": now_s, "exp": now_s + 600, "tenant": "acme"}
        return {name: value for name, value in {**claims, **changes}.items() if value is not None}

    def token(self, kid: str, algorithm: str = "RS256", **changes: object) -> str:
        """Signed with that key of `keys`."""
        return jwt.encode(self.claims(**changes), self.keys[kid], algorithm, headers={"kid": kid})


@contextmanager
def local_issuer() -> Iterator[Issuer]:
    """Serves until the block is left, each request in a thread."""
    issuer, is_over = Issuer(""), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in issuer.trickles:
                self.trickle()
                return
            answer = issuer.answer(self.path)
            self.send_response(302 if self.path in issuer.redirects else 500 if answer is None else 200)
            self.send_header("location", issuer.redirects.get(self.path, self.path))
            self.send_header("content-length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def trickle(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # until whoever asked has had enough
                while not is_over.wait(0.02):
                    self.wfile.write(b" ")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield issuer
    finally:
        is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()
