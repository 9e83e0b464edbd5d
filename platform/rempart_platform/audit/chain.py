"""Records chained by hashes, and cut into segments.

    {"chain": …, "day": …, "first": 7, "previous": <link of the segment before>, "segment": 2}        head
    {…, "kind": "request", "n": 7, "previous": <hash of the head>}                                    record
    {…, "kind": "request", "n": 8, "previous": <hash of record 7>}
    {"hash": <hash of record 8>, "last": 8, "signature": …}                                           seal

A line's hash is SHA-256(hash of the line before ‖ line); that of a segment's seal is its link. So each line stands for
all that came before it, in its own segment and in all before. Lines are JSON with sorted keys and no blanks. One router
process writes one chain; a chain begins with the link of no segment, 32 zero bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from rempart_platform.audit.signing import Signer
from rempart_platform.audit.values import Entry

NO_LINK = bytes(32)
_ENCODER = msgspec.json.Encoder(order="sorted", enc_hook=str)


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed segment."""

    path: str
    """In the store."""
    data: bytes
    last: int
    """Number of its last record."""
    link: bytes


def hash_line(previous: bytes, line: bytes) -> bytes:
    return hashlib.sha256(previous + line).digest()


def encode_line(fields: dict[str, object]) -> bytes:
    return _ENCODER.encode(fields)


def time_text(seconds: float) -> str:
    """UTC, to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


def day_text(seconds: float) -> str:
    """The UTC day."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def segment_path(chain: str, day: str, first: int) -> str:
    """Within a chain, paths are in the order of the segments."""
    return f"chains/{chain}/{day}/{first:016d}.jsonl"


def head_line(*, chain: str, day: str, first: int, previous: bytes, number: int) -> bytes:
    return encode_line({"chain": chain, "day": day, "first": first, "previous": previous.hex(), "segment": number})


def seal_line(*, digest: bytes, last: int, signature: bytes) -> bytes:
    return encode_line({"hash": digest.hex(), "last": last, "signature": signature.hex()})


class ChainWriter:
    """Gives records their places.

    Args:
        chain: its name, which no other chain has.
        signer: signs each segment; None signs none.
    """

    def __init__(self, chain: str, signer: Signer | None = None) -> None:
        self.chain = chain
        self._signer = signer
        self._day = ""
        self._num_records = 0
        self._num_segments = 0
        self._link = NO_LINK

    @property
    def public_key(self) -> bytes:
        """32 bytes; none when nothing is signed."""
        return self._signer.public_key if self._signer else b""

    def seal(self, entries: Sequence[Entry]) -> Segment:
        """The next segment. Its day is that of its first record, and never before that of the segment before."""
        first = self._num_records
        self._day = max(self._day, day_text(entries[0].at_s))
        path = segment_path(self.chain, self._day, first)
        head = head_line(chain=self.chain, day=self._day, first=first, previous=self._link, number=self._num_segments)
        lines = [head]
        digest = hash_line(self._link, head)
        for number, entry in enumerate(entries, first):
            place: dict[str, object] = {"n": number, "kind": entry.kind, "at": time_text(entry.at_s)}
            line = encode_line({**entry.fields, **place, "previous": digest.hex()})
            digest = hash_line(digest, line)
            lines.append(line)
        last = first + len(entries) - 1
        lines.append(seal_line(digest=digest, last=last, signature=self._signer.sign(digest) if self._signer else b""))
        self._num_records = last + 1
        self._num_segments += 1
        self._link = hash_line(digest, lines[-1])
        return Segment(path, b"\n".join(lines) + b"\n", last, self._link)
