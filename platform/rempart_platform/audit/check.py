"""Checks one chain, segment by segment, and says which record is the first that cannot be trusted."""

from dataclasses import dataclass
from typing import Any

import msgspec

from rempart_platform.audit.beginning import WHOLE, Beginning
from rempart_platform.audit.chain import NO_LINK, hash_line, head_line, seal_line, segment_path
from rempart_platform.audit.signing import is_signed
from rempart_platform.audit.values import Kind

_MIN_LINES = 3
_DECODER = msgspec.json.Decoder()


class BadChainError(Exception):
    """What is wrong, with the chain and the first bad record."""


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain stood when its router last sealed: number of the last record, and the segment's link."""

    last: int = -1
    """-1 before the first segment."""
    link: bytes = NO_LINK


def decode_line(text: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object."""
    try:
        value = _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class ChainReader:
    """The state of a check.

    Args:
        chain: its name.
        public_key: who must have signed it, 32 bytes; None trusts whom the chain itself names, which finds damage but
            no forgery.
        known: what Redis says of it; None when it is not asked.
        beginning: what the first segment follows, where those before it were removed for their age.

    Raises:
        BadChainError: the beginning is not that of a chain of this key and this head.
    """

    def __init__(
        self,
        chain: str,
        public_key: bytes | None = None,
        known: Head | None = None,
        beginning: Beginning = WHOLE,
    ) -> None:
        self._chain = chain
        self._public_key = public_key
        self._known = known
        self._day = beginning.day
        self._first = self._next = beginning.first
        self._num_segments = beginning.segment
        self._link = beginning.previous
        self._is_ended = beginning.is_ended
        if beginning.public_key is not None:
            self._take_key(beginning.public_key)
        if known is not None and known.last < self._next - 1:
            self._known = Head()  # what Redis heard of last was removed
        self._check_known()

    @property
    def num_records(self) -> int:
        """That are right."""
        return self._next - self._first

    @property
    def beginning(self) -> Beginning:
        """What the next segment must follow."""
        return Beginning(self._next, self._num_segments, self._link, self._day, self._public_key, self._is_ended)

    def take(self, path: str, data: bytes) -> list[dict[str, Any]]:
        """The records of the next segment.

        Raises:
            BadChainError: something in it is not as it was written, or it is not the next.
        """
        first, day = self._next, self._day_of(path)
        lines = data.split(b"\n")
        if lines.pop() != b"" or len(lines) < _MIN_LINES:
            raise self._bad(first, f"the segment {path} is cut off")
        head, *texts, seal = lines
        expected = head_line(chain=self._chain, day=day, first=first, previous=self._link, number=self._num_segments)
        if head != expected:
            raise self._bad(first, f"the segment {path} does not follow the one before it")
        records: list[dict[str, Any]] = []
        digest = hash_line(self._link, head)
        for number, text in enumerate(texts, first):
            records.append(self._record(number, text, digest, num_before=len(records)))
            digest = hash_line(digest, text)
        last = first + len(texts) - 1
        self._check_seal(path, seal, digest, last)
        self._day, self._next, self._num_segments = day, last + 1, self._num_segments + 1
        self._link = hash_line(digest, seal)
        self._check_known()
        return records

    def finish(self) -> None:
        """Raises BadChainError when segments are missing at the end."""
        if self._known is not None and self._known.last >= self._next:
            raise self._bad(self._next, f"the chain ends here, but it had {self._known.last + 1} records")
        if self._next == 0 and self._known is None:
            raise self._bad(0, "the chain has no segment")

    def _day_of(self, path: str) -> str:
        """The day that the path names, when it is the path of a segment that may come now."""
        parts = path.split("/")
        day = parts[-2] if len(parts) > 1 else ""
        if path != segment_path(self._chain, day, self._next):
            raise self._bad(self._next, f"it is missing: {path} comes in its place")
        if day < self._day:
            raise self._bad(self._next, f"the segment {path} is older than the one before it")
        return day

    def _record(self, number: int, text: bytes, previous: bytes, *, num_before: int) -> dict[str, Any]:
        record = decode_line(text)
        if record is None:
            raise self._bad(number, "it cannot be read")
        if record.get("n") != number:
            raise self._bad(number, f"it is missing: record {record.get('n')} is in its place")
        if record.get("previous") != previous.hex():
            if num_before == 0:
                raise self._bad(number, "it was changed after it was written")
            raise self._bad(number - 1, f"it, or what record {number} says of it, was changed after it was written")
        if (record.get("kind") == Kind.GENESIS) != (number == 0) or self._is_ended:
            raise self._bad(number, f"no '{record.get('kind')}' can be there")
        if number == 0:
            self._take_key(self._key_of(record))
        self._is_ended = record.get("kind") == Kind.END
        return record

    def _key_of(self, genesis: dict[str, Any]) -> bytes:
        try:
            return bytes.fromhex(genesis.get("public_key", ""))
        except (TypeError, ValueError):
            raise self._bad(0, "its public key cannot be read") from None

    def _take_key(self, named: bytes) -> None:
        if self._public_key is not None and named != self._public_key:
            raise self._bad(0, "the chain is not signed with the given key")
        self._public_key = named

    def _check_seal(self, path: str, seal: bytes, digest: bytes, last: int) -> None:
        try:
            signature = bytes.fromhex((decode_line(seal) or {})["signature"])
        except (KeyError, TypeError, ValueError):
            raise self._bad(last, f"the seal of {path} cannot be read") from None
        if seal != seal_line(digest=digest, last=last, signature=signature):
            raise self._bad(last, f"it or the seal of {path} was changed after it was written")
        if self._public_key and not is_signed(self._public_key, signature, digest):
            raise self._bad(last, f"the signature of {path} is wrong")

    def _check_known(self) -> None:
        known = self._known
        if known is None or known.last < 0 or known.last >= self._next:
            return
        if known.last == self._next - 1:
            if known.link != self._link:
                raise self._bad(known.last, "it is not the one that was sealed")
            self._known = Head()  # it is reached; what comes after it was sealed since
            return
        raise self._bad(known.last, "no segment ends with it, as one did when it was sealed")

    def _bad(self, number: int, what: str) -> BadChainError:
        return BadChainError(f"chain {self._chain}, record {number}: {what}")
