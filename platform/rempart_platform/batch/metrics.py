"""Metrics of batch jobs, `rempart_batch_*`. Those of all jobs are the same from every router."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from rempart_platform.batch.result_lines import Tally

_PREFIX = "rempart_batch_"


class BatchMetrics:
    """A router's part in batch jobs, and how all of them stand."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tasks = Counter(
            _PREFIX + "tasks", "Tasks that left this router, by how.", ("kind", "outcome"), registry=registry
        )
        self._lines = Counter(
            _PREFIX + "lines", "Lines stored by this router, by how.", ("outcome",), registry=registry
        )
        self._retries = Counter(
            _PREFIX + "line_retries", "Attempts that were waited out.", ("code",), registry=registry
        )
        self._dead_letters = Counter(
            _PREFIX + "dead_letters", "Tasks given up after deliveries in vain.", registry=registry
        )
        self._repaired = Counter(_PREFIX + "repaired_tasks", "Lost tasks that were added again.", registry=registry)
        self.lines_in_flight = Gauge(_PREFIX + "lines_in_flight", "Lines that this router runs now.", registry=registry)
        self._tasks_held = Gauge(_PREFIX + "tasks_held", "Tasks that this router works on.", registry=registry)
        self._open = Gauge(_PREFIX + "open_jobs", "Jobs that have not ended, of all tenants.", registry=registry)
        self._oldest = Gauge(
            _PREFIX + "oldest_open_job_seconds",
            "Since the creation of the oldest job that has not ended.",
            registry=registry,
        )

    def task_taken(self) -> None:
        self._tasks_held.inc()

    def task_left(self, kind: str, outcome: str) -> None:
        """`kind`: "validate", "shard" or "finalize"; `outcome`: "done", "lost", "released" or "failed"."""
        self._tasks_held.dec()
        self._tasks.labels(kind, outcome).inc()

    def lines_stored(self, tally: Tally) -> None:
        for outcome, count in tally.counts.items():
            self._lines.labels(outcome.name.lower()).inc(count)

    def line_retried(self, code: str) -> None:
        self._retries.labels(code).inc()

    def dead_letter(self) -> None:
        self._dead_letters.inc()

    def repaired(self, count: int) -> None:
        self._repaired.inc(count)

    def stand(self, num_open: int, oldest_s: float) -> None:
        """How all jobs stand."""
        self._open.set(num_open)
        self._oldest.set(oldest_s)
