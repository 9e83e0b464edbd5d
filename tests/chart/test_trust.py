"""SSL_CERT_FILE, which the chart sets to an operator's own authority, is what those look at that speak TLS."""

import datetime
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CLIENTS = {
    "object storage": """
import obstore, sys
from obstore.store import S3Store
access = {"region": "x", "access_key_id": "id", "secret_access_key": "secret"}
store = S3Store("bucket", endpoint=sys.argv[1], retry_config={"max_retries": 0}, **access)
print(bytes(obstore.get(store, "key").bytes()))
""",
    "the issuer": """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1]).read())
""",
}


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        for name, value in (
            ("content-length", "2"),
            ("etag", '"x"'),
            ("last-modified", "Wed, 25 Nov 2026 08:00:00 GMT"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"hi")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing to say."""


def signed(name: str, by: x509.Name, key: ec.EllipticCurvePrivateKey, subject: ec.EllipticCurvePublicKey) -> bytes:
    """A certificate in PEM; of an authority when it signs itself."""
    now = datetime.datetime.now(datetime.UTC)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(by)
        .public_key(subject)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=own == by, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its URL, and the file of its authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    (folder / "ca.crt").write_bytes(signed("authority", name, authority, authority.public_key()))
    (folder / "tls.pem").write_bytes(
        signed("localhost", name, authority, key.public_key())
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as http:
        http.socket = context.wrap_socket(http.socket, server_side=True)
        serving = threading.Thread(target=http.serve_forever)
        serving.start()
        yield f"https://localhost:{http.server_port}", folder / "ca.crt"
        http.shutdown()
        serving.join()


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_named_is_trusted_and_else_it_is_not(client: str, server: tuple[str, Path]) -> None:
    url, authority = server
    command = [sys.executable, "-c", CLIENTS[client], url]
    environ = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    stranger = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert stranger.returncode == 1
    known = subprocess.run(
        command,
        env=environ | {"SSL_CERT_FILE": str(authority)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert known.stdout == "b'hi'\n", known.stderr
