"""How a router does batch jobs."""

from dataclasses import dataclass

from rempart_platform.batch.values import BatchLimits
from rempart_platform.bounds import require_positive


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """All routers of one Redis should agree on it."""

    store: str = ""
    """Where files and results are kept: file:///FOLDER, which all routers share, or s3://BUCKET/PREFIX. "" for no
    batch jobs."""
    lines_per_shard: int = 64
    """What a worker takes at a time."""
    max_shard_bytes: int = 1024 * 1024
    """Of input; a shard has fewer lines rather than more bytes."""
    max_lines_in_flight: int = 32
    """Of this router."""
    max_lines_in_flight_per_tenant: int = 16
    """Of this router; of one model also those that wait for a quota or an engine, which do not count above."""
    max_shards: int = 256
    """That this router works on at a time, those among them whose lines all wait: it holds their input in memory."""
    max_shards_per_tenant: int = 4
    """That this router works on at a time, of one model."""
    max_kept_answer_bytes: int = 64 * 1024
    """Of one line, in Redis until its shard is stored; what is larger is kept in the storage meanwhile."""
    lease_s: float = 15.0
    """How long a crashed router's shards rest before another takes them. Renewed three times as often."""
    poll_s: float = 1.0
    """How often an idle router looks for work."""
    max_deliveries: int = 3
    """Of a shard without any line answered; then its open lines are answered with an error."""
    max_line_attempts: int = 3
    """Of a line that fails in a way that may pass; a full queue, a quota and missing engines are waited out instead."""
    max_engine_losses: int = 5
    """Under one line, in the hands of one worker; then it is answered with that error, for it may be what ends them."""
    drain_s: float = 2.0
    """How long giving back shards holds up a router that stops."""
    janitor_s: float = 30.0
    """How often lost shards, expired files and old jobs are looked for."""
    keep_parts_s: float = 3600.0
    """How long the results of single shards outlive their job: longer than Redis may forget."""
    upload_timeout_s: float = 24 * 3600.0
    """After that, what is left of an upload that never ended is removed."""
    record_lifetime_s: float = 30 * 24 * 3600.0
    """For how long ended jobs are listed."""
    limits: BatchLimits = BatchLimits()

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("drain_s", "keep_parts_s", "record_lifetime_s"))
