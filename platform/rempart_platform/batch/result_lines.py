"""Answers of lines: as they are kept until a job ends, and as its result files show them.

kept:  <letter of the outcome><JSON>\\n          shown:  <JSON>\\n, in the output or the error file
"""

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import msgspec

from rempart_platform.batch.values import LineAnswer


class Outcome(Enum):
    """How a line ended."""

    COMPLETED = "C"
    FAILED = "F"
    EXPIRED = "E"
    CANCELLED = "X"
    DEAD_LETTER = "D"

    @property
    def is_success(self) -> bool:
        return self is Outcome.COMPLETED


_UNANSWERED = {
    Outcome.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Outcome.CANCELLED: ("batch_cancelled", "This request was not executed because its batch was cancelled."),
    Outcome.DEAD_LETTER: ("dead_letter", "This request was given up after it had been tried in vain several times."),
}


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _Line(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


@dataclass(frozen=True, slots=True)
class ResultLine:
    """The answer of one line."""

    outcome: Outcome
    json: bytes

    @classmethod
    def answered(cls, custom_id: str, answer: LineAnswer) -> "ResultLine":
        response = _Response(answer.status_code, answer.request_id, msgspec.Raw(answer.body))
        outcome = Outcome.COMPLETED if answer.error is None else Outcome.FAILED
        return cls(outcome, _encoded(custom_id, response, None))

    @classmethod
    def unanswered(cls, custom_id: str, outcome: Outcome) -> "ResultLine":
        """`outcome` says why no engine answered."""
        return cls(outcome, _encoded(custom_id, None, _Error(*_UNANSWERED[outcome])))

    @classmethod
    def parse(cls, kept: bytes) -> "ResultLine":
        return cls(Outcome(chr(kept[0])), kept[1:])

    def kept(self) -> bytes:
        return self.outcome.value.encode() + self.json


def _encoded(custom_id: str, response: _Response | None, error: _Error | None) -> bytes:
    return msgspec.json.encode(_Line(f"batch_req_{secrets.token_hex(16)}", custom_id, response, error))


def join_results(results: Iterable[ResultLine]) -> bytes:
    """What is stored of a shard."""
    return b"".join(result.kept() + b"\n" for result in results)


def split_results(stored: bytes) -> Iterator[ResultLine]:
    """JSON holds no bare line ends."""
    return (ResultLine.parse(kept) for kept in stored.split(b"\n") if kept)


@dataclass(frozen=True, slots=True)
class Tally:
    """Lines of a shard by how they ended."""

    counts: Counter[Outcome]

    @classmethod
    def of(cls, stored: bytes) -> "Tally":
        return cls(Counter(result.outcome for result in split_results(stored)))

    @property
    def num_completed(self) -> int:
        return self.counts[Outcome.COMPLETED]

    @property
    def num_failed(self) -> int:
        return self.counts.total() - self.num_completed
