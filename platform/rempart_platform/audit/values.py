"""What the audit log is told, and how it is set."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from rempart_platform.bounds import require, require_positive

_MOST_SEGMENT_RECORDS = 100_000
"""A segment of so many stays far below what `SegmentStore` reads."""


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """How a router keeps its audit log.

    Raises:
        OutOfBoundsError: a number makes no sense.
        ValueError: a key goes with nothing that it could sign, or days with nothing that is kept.
    """

    store: str = ""
    """Where: file:///FOLDER or s3://BUCKET/PREFIX, see `object_store.py`. "" keeps no audit log."""
    seal_s: float = 1.0
    """For how long a record may wait until it is sealed."""
    max_segment_records: int = 2_000
    """A segment is sealed as soon as it has so many."""
    max_buffered: int = 100_000
    """Records that wait while the store does not take them, of 1 to 2 KB each; then `when_full` says what happens.

    What was refused takes half of it at most: nobody fills the log for the others with requests that nobody serves.
    """
    max_refused_acts: int = 100
    """Admin calls without the right that are recorded between two seals; further ones are counted. Anybody can call."""
    when_full: Literal["refuse", "drop"] = "refuse"
    """"refuse" admits no new requests; "drop" goes on and loses records, which it counts."""
    signing_key: str = ""
    """PEM file of an ed25519 private key: every segment is signed. "" signs none."""
    act_timeout_s: float = 5.0
    """How long an admin act waits for its record to be sealed."""
    put_timeout_s: float = 10.0
    """Of one segment."""
    backoff_s: float = 0.1
    """The first wait after a failure; doubled each time, up to `max_backoff_s`."""
    max_backoff_s: float = 5.0
    """The longest wait between two attempts."""
    retention_days: int = 0
    """For how many days records are kept at least; older segments are removed. 0 keeps them for ever."""
    prune_s: float = 3600.0
    """How often old segments are looked for."""
    close_timeout_s: float = 10.0
    """How long a router that stops tries to seal what is left."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("retention_days", "close_timeout_s"))
        most = _MOST_SEGMENT_RECORDS
        require(self.max_segment_records <= most, "max_segment_records", f"at most {most}")
        if self.signing_key and not self.store:
            raise ValueError("--audit-signing-key goes with --audit-store")
        if self.retention_days and not self.store:
            raise ValueError("--audit-retention-days goes with --audit-store")

    @property
    def room_for_refused(self) -> int:
        """Half of `max_buffered`, and at least one."""
        return (self.max_buffered + 1) // 2


class Kind(StrEnum):
    """What a record tells."""

    GENESIS = "genesis"
    """The first of every chain: which router, and how it is set."""
    ACT = "act"
    """An admin act is about to be done."""
    OUTCOME = "outcome"
    """How it ended; `act_id` says which."""
    REQUEST = "request"
    """A tenant's request ended."""
    GAP = "gap"
    """Here records are missing that could not be kept."""
    REMOVAL = "removal"
    """Old segments of a chain, `of_chain`, are about to be removed."""
    END = "end"
    """The router stopped in order; nothing comes after it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record before it has a place in the chain. `at_s` is seconds since the epoch."""

    at_s: float
    kind: Kind
    fields: Mapping[str, object]
