"""The byte-level alphabet of GPT-2: each of the 256 bytes as one printable character."""

_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


def _alphabet() -> dict[str, int]:
    bytes_of = {chr(byte): byte for byte in _PRINTABLE}
    others = (byte for byte in range(256) if byte not in _PRINTABLE)
    return bytes_of | {chr(256 + position): byte for position, byte in enumerate(others)}


BYTE_OF = _alphabet()
"""Character of the alphabet to the byte it stands for."""


def token_to_bytes(token: str) -> bytes:
    """Bytes of a vocabulary entry; an entry outside of the alphabet stands for itself."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")
