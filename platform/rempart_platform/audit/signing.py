"""ed25519 signatures of segments: who may write to the store still cannot write a chain of their own.

Keys are PEM files, as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` make them.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

# No signature of ours means anything else that the same key might sign.
_PURPOSE = b"rempart audit segment\0"


class SigningKeyError(ValueError):
    """A file that holds no such key."""


class Signer:
    """Signs with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        """32 bytes."""

    def sign(self, digest: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(_PURPOSE + digest)


def is_signed(public_key: bytes, signature: bytes, digest: bytes) -> bool:
    """Whether the owner of the public key (32 bytes) signed the digest."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _PURPOSE + digest)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_signing_key(path: Path) -> Signer:
    """Raises SigningKeyError naming the file."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise SigningKeyError(f"{path} cannot be read as a private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(f"{path} holds no ed25519 key")
    return Signer(key)


def read_public_key(path: Path) -> bytes:
    """32 bytes. Raises SigningKeyError naming the file."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SigningKeyError(f"{path} cannot be read as a public key: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SigningKeyError(f"{path} holds no ed25519 key")
    return key.public_bytes_raw()
