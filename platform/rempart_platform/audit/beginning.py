"""Where what is kept of a chain begins, once its oldest segments were removed for their age.

    {"chain": …, "day": …, "ended": false, "first": 7, "previous": <link of the last one removed>, …}
    {"signature": …}

The first segment that is kept must follow it, just as it followed the one that is gone. Without it, or with another,
the chain has lost its beginning to somebody who was not asked to remove it.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec

from rempart_platform.audit.chain import NO_LINK, encode_line
from rempart_platform.audit.signing import Signer, is_signed

# No segment's digest is one of this.
_PURPOSE = b"rempart audit beginning\0"


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the next segment of a chain must follow. The default is that of a whole chain."""

    first: int = 0
    """Number of the next record."""
    segment: int = 0
    """Number of the next segment."""
    previous: bytes = NO_LINK
    """The link of the segment before."""
    day: str = ""
    """Its UTC day."""
    public_key: bytes | None = None
    """Who signs the chain, 32 bytes, or none where nobody does. None: the genesis, which is yet to come, says it."""
    is_ended: bool = False
    """Nothing comes after it."""


WHOLE = Beginning()


_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    chain: str
    day: str
    ended: bool
    first: _Number
    previous: str
    public_key: str
    segment: _Number


class _Seal(msgspec.Struct, forbid_unknown_fields=True):
    signature: str


class BadBeginningError(ValueError):
    """What is wrong with it."""


def encode_beginning(chain: str, beginning: Beginning, signer: Signer | None) -> bytes:
    """As it is stored."""
    told = _Line(
        chain=chain,
        day=beginning.day,
        ended=beginning.is_ended,
        first=beginning.first,
        previous=beginning.previous.hex(),
        public_key=(beginning.public_key or b"").hex(),
        segment=beginning.segment,
    )
    line = encode_line(msgspec.structs.asdict(told))
    signature = signer.sign(_digest(line)) if signer else b""
    return line + b"\n" + encode_line({"signature": signature.hex()}) + b"\n"


def decode_beginning(chain: str, data: bytes, public_key: bytes | None = None) -> Beginning:
    """Reads one.

    Args:
        chain: whose it must be.
        data: as it is stored.
        public_key: who must have signed it, 32 bytes; None asks for no one.

    Raises:
        BadBeginningError: it is none, or another chain's, or not signed so.
    """
    try:
        line, seal, rest = data.split(b"\n")
        told = msgspec.json.decode(line, type=_Line)
        signature = bytes.fromhex(msgspec.json.decode(seal, type=_Seal).signature)
        beginning = Beginning(
            first=told.first,
            segment=told.segment,
            previous=bytes.fromhex(told.previous),
            day=told.day,
            public_key=bytes.fromhex(told.public_key),
            is_ended=told.ended,
        )
    except ValueError:
        raise BadBeginningError("it cannot be read") from None
    if rest or told.chain != chain:
        raise BadBeginningError("it is that of another chain")
    if public_key is not None and not is_signed(public_key, signature, _digest(line)):
        raise BadBeginningError("it is not signed with the given key")
    return beginning


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(_PURPOSE + line).digest()
