"""Ed25519 signatures over the exact bytes of a file, as `openssl pkeyutl -sign -rawin` makes them: 64 raw bytes."""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key


class SignatureError(ValueError):
    """A key cannot be used, or a signature is not that key's over these bytes."""


def sign(message: bytes, private_key: Path) -> bytes:
    """The signature by an unencrypted PEM key (`openssl genpkey -algorithm ed25519`).

    Raises:
        SignatureError: there is no such key in the file.
    """
    try:
        key = load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{private_key}: is not a private key that can be used: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{private_key}: is not an ed25519 key")
    return key.sign(message)


def require_signature(message: bytes, signature: bytes, public_key: Path) -> None:
    """Raises SignatureError unless the signature is that of the PEM key's owner over the message."""
    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{public_key}: is not a public key that can be used: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{public_key}: is not an ed25519 key")
    try:
        key.verify(signature, message)
    except InvalidSignature:
        raise SignatureError(f"the signature is not one by {public_key} over these bytes") from None
