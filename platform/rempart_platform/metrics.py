"""Every metric of a router, with its unit, its labels, and a bound on how many values a label may take.

Models come from the catalog and endpoints from the configuration, so they are few. Tenants are not: after a number of
distinct names, further ones count as "other".
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rempart_platform.endpoints.load import EndpointState
from rempart_platform.generation import Usage
from rempart_platform.metric_labels import by_labels
from rempart_platform.request_trace import RequestTrace
from rempart_platform.scaling_metrics import ScalingMetrics
from rempart_platform.tenancy.queue_values import Place, QueueSnapshot

_PREFIX = "rempart_router_"
_FAST_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_TPOT_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WAIT_S = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
_QUOTA_EVENTS = ("reserved", "settled", "refunded", "ending_deferred", "ending_lost", "lease_expired")
"""These are told from the start, since an increase is seen only of what was there before; refusals as they come."""
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class BoundedLabel:
    """The first `limit` distinct values stay themselves; all later ones become "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._values:
            return value
        if len(self._values) >= self._limit:
            return "other"
        self._values.add(value)
        return value


class RouterMetrics:
    """A router's metrics on a registry of its own.

    Args:
        registry: where they are registered.
        max_tenants: distinct values of the label `tenant`.
    """

    def __init__(self, registry: CollectorRegistry, max_tenants: int = 500) -> None:
        self.registry = registry
        self.scaling = ScalingMetrics(registry)
        self._tenant = BoundedLabel(max_tenants)

        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return by_labels(Counter(_PREFIX + name, text, labels, registry=registry))

        def gauge(name: str, text: str, *labels: str) -> Callable[..., Gauge]:
            return by_labels(Gauge(_PREFIX + name, text, labels, registry=registry))

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Callable[..., Histogram]:
            family = Histogram(_PREFIX + name, text, ("model", *labels), registry=registry, buckets=buckets)
            return by_labels(family)

        self._requests = counter("requests", "Requests that ended, by how.", "model", "tenant", "outcome")
        self._rejections = counter("rejections", "Requests refused before an engine saw them.", "model", "reason")
        self._tenant_rejections = counter(
            "tenant_rejections", "Requests refused before an engine saw them.", "tenant", "reason"
        )
        self._retries = counter("dispatch_retries", "Requests handed to a further endpoint.", "model")
        self._engine_errors = counter("engine_errors", "Attempts that an engine or its loss ended.", "model", "code")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens charged.", "model", "tenant")
        self._completion_tokens = counter("completion_tokens", "Output tokens delivered.", "model", "tenant")
        self._cached_tokens = counter("cached_tokens", "Prompt tokens found in the prefix cache.", "model", "tenant")
        self._expected_cached_tokens = counter(
            "expected_cached_tokens", "Prompt tokens that the pick expected there.", "model"
        )
        self._quota_tokens = counter("quota_tokens", "Tokens of quotas, by what became of them.", "tenant", "state")
        self._quota_events = counter("quota_events", "What befell reservations.", "event")
        for event in _QUOTA_EVENTS:
            self._quota_events(event)
        overgranted = "Tokens granted beyond a limit of tokens per minute: 0, or quotas are wrong."
        self._overgranted = Counter(_PREFIX + "quota_overgranted_tokens", overgranted, registry=registry)
        self._cost = counter("cost", "Cost of what was used, in the operator's currency.", "model", "tenant")
        self._in_flight = gauge("requests_in_flight", "Requests admitted and not ended.", "model")
        self._queue_waiting = gauge("queue_waiting_requests", "This router's requests that wait.", "model", "tenant")
        self._queue_wait = histogram("queue_wait_seconds", "Wait for room in the engines.", _WAIT_S, "tenant")
        self._queue_class_wait = histogram(
            "queue_class_wait_seconds", "Wait for room in the engines, by service tier.", _WAIT_S, "class"
        )
        self._queue_events = counter("queue_events", "What befell requests in the fair queue.", "model", "event")
        self._queue_depth = gauge("queue_depth", "Requests of all routers that wait.", "model", "class")
        self._queue_lag = gauge(
            "queue_virtual_time_lag", "Tokens per weight between the first and the last tenant.", "model", "class"
        )
        self._queue_granted = gauge("queue_granted", "Room of the engines that is granted.", "model", "unit")
        self._queue_room = gauge("queue_capacity", "Room of the engines.", "model", "unit")
        self._queue_jain = gauge("queue_jain_index", "Of tokens per weight served in a minute, all tenants.", "model")
        self._queue_time = histogram("queue_time_seconds", "From arrival to the hand-over to an endpoint.", _FAST_S)
        self._dispatch_time = histogram(
            "dispatch_time_seconds", "From the hand-over to the engine's first event.", _TTFT_S
        )
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first text.", _TTFT_S)
        self._tpot = histogram("time_per_output_token_seconds", "Between two tokens of a choice, mean.", _TPOT_S)
        self._e2e = histogram("request_duration_seconds", "From arrival to the end.", _E2E_S)
        self._prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output_length = histogram("request_completion_tokens", "Output tokens of a request.", _TOKENS)

    def request_admitted(self, trace: RequestTrace) -> None:
        request = trace.request
        self._in_flight(request.model).inc()
        self.scaling.began(request)
        self._count_quota_tokens(trace, "reserved", request.worst_case_tokens)

    def request_left(self, trace: RequestTrace, cost_nanos: int = 0) -> None:
        """The counterpart of `request_admitted`. The cost is in billionths of the operator's currency."""
        usage = trace.usage
        self._cost(trace.request.model, self._tenant(trace.request.caller.tenant)).inc(cost_nanos / 1e9)
        num_settled = usage.prompt_tokens + usage.completion_tokens
        self._in_flight(trace.request.model).dec()
        self.scaling.left(trace)
        self._count_quota_tokens(trace, "settled", num_settled)
        self._count_quota_tokens(trace, "refunded", max(trace.request.worst_case_tokens - num_settled, 0))

    def attempt_failed(self, model: str, code: str) -> None:
        self._engine_errors(model, code).inc()

    def retried(self, model: str) -> None:
        self._retries(model).inc()

    def request_ended(self, trace: RequestTrace) -> None:
        """Counts a request once, at its end."""
        model, tenant, usage = trace.request.model, self._tenant(trace.request.caller.tenant), trace.usage
        self._requests(model, tenant, trace.outcome).inc()
        self._e2e(model).observe(trace.ended_s - trace.started_s)
        if trace.dispatched_s is None:
            if trace.error is not None:
                reason = trace.violation.metric if trace.violation is not None else trace.outcome
                self._rejections(model, reason).inc()
                self._tenant_rejections(tenant, reason).inc()
            return
        self._queue_time(model).observe(trace.dispatched_s - trace.started_s)
        if trace.first_event_s is None:
            return
        self._dispatch_time(model).observe(trace.first_event_s - trace.dispatched_s)
        self._prompt_tokens(model, tenant).inc(usage.prompt_tokens)
        self._completion_tokens(model, tenant).inc(usage.completion_tokens)
        self._cached_tokens(model, tenant).inc(usage.cached_tokens)
        self._expected_cached_tokens(model).inc(trace.num_expected_cached_tokens)
        self._prompt_length(model).observe(usage.prompt_tokens)
        self._output_length(model).observe(usage.completion_tokens)
        if trace.time_to_first_token_s is not None:
            self._ttft(model).observe(trace.time_to_first_token_s)
        if trace.time_per_output_token_s is not None:
            self._tpot(model).observe(trace.time_per_output_token_s)

    def _count_quota_tokens(self, trace: RequestTrace, state: str, num_tokens: int) -> None:
        self._quota_tokens(self._tenant(trace.request.caller.tenant), state).inc(num_tokens)

    def count_overgranted_tokens(self, tokens: int) -> None:
        self._overgranted.inc(tokens)

    def count_quota_event(self, event: str, count: int = 1) -> None:
        self._quota_events(event).inc(count)

    def queue_entered(self, tenant: str, model: str) -> None:
        self._queue_waiting(model, self._tenant(tenant)).inc()

    def queue_left(self, tenant: str, model: str) -> None:
        """The counterpart of `queue_entered`."""
        self._queue_waiting(model, self._tenant(tenant)).dec()

    def queue_granted(self, place: Place) -> None:
        request = place.request
        self._queue_wait(request.model, self._tenant(request.tenant)).observe(place.waited_s)
        self._queue_class_wait(request.model, request.service_tier.name.lower()).observe(place.waited_s)
        self._queue_waiting(request.model, self._tenant(request.tenant)).inc(0)  # told from now on

    def count_queue_event(self, model: str, event: str, count: int = 1) -> None:
        self._queue_events(model, event).inc(count)

    def queue_stands(self, model: str, snapshot: QueueSnapshot) -> None:
        """How the queue of all routers stands; each of them tells the same."""
        for service_tier, part in snapshot.classes.items():
            self._queue_depth(model, service_tier.name.lower()).set(part.num_waiting)
            self._queue_lag(model, service_tier.name.lower()).set(part.lag)
        for unit, granted, room in (
            ("rows", snapshot.rows, snapshot.max_rows),
            ("tokens", snapshot.tokens, snapshot.max_tokens),
        ):
            self._queue_granted(model, unit).set(granted)
            self._queue_room(model, unit).set(room)
        self._queue_jain(model).set(snapshot.jain)


class QueueMetrics:
    """The fair queue's observer."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def entered(self, tenant: str, model: str) -> None:
        self._metrics.queue_entered(tenant, model)

    def left(self, tenant: str, model: str) -> None:
        self._metrics.queue_left(tenant, model)

    def granted(self, place: Place) -> None:
        self._metrics.queue_granted(place)

    def refused(self, tenant: str, model: str, reason: str) -> None:
        self._metrics.count_queue_event(model, f"refused_{reason}")

    def swept(self, model: str, count: int) -> None:
        self._metrics.count_queue_event(model, "swept", count)

    def looked(self, model: str, snapshot: QueueSnapshot) -> None:
        self._metrics.queue_stands(model, snapshot)


class QuotaMetrics:
    """The quota ledger's observer."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def reserved(self, tenant: str) -> None:
        self._metrics.count_quota_event("reserved")

    def refused(self, tenant: str, reason: str) -> None:
        self._metrics.count_quota_event(f"refused_{reason}")

    def overgranted(self, tokens: int) -> None:
        self._metrics.count_overgranted_tokens(tokens)

    def settled(self, tenant: str, model: str, usage: Usage) -> None:
        self._metrics.count_quota_event("settled")

    def refunded(self, tenant: str) -> None:
        self._metrics.count_quota_event("refunded")

    def ending_deferred(self) -> None:
        self._metrics.count_quota_event("ending_deferred")

    def ending_lost(self) -> None:
        self._metrics.count_quota_event("ending_lost")

    def leases_expired(self, count: int) -> None:
        self._metrics.count_quota_event("lease_expired", count)


class EndpointCollector(Collector):
    """Gauges of all endpoints, read from their states at each scrape.

    Args:
        states: gives the states of this moment; called from the scraping thread.
    """

    def __init__(self, states: Callable[[], Sequence[EndpointState]]) -> None:
        self._states = states

    def collect(self) -> Iterator[GaugeMetricFamily]:
        states = self._states()
        for name, text, value in _ENDPOINT_GAUGES:
            family = GaugeMetricFamily(f"{_PREFIX}endpoint_{name}", text, labels=("endpoint", "model"))
            for state in states:
                family.add_metric((state.address, state.model.name if state.model else ""), value(state))
            yield family


_ENDPOINT_GAUGES: tuple[tuple[str, str, Callable[[EndpointState], float]], ...] = (
    ("ready", "1 when the endpoint is ready and not draining.", lambda state: state.is_ready and not state.is_draining),
    ("draining", "1 when the engine takes no new requests.", lambda state: state.is_draining),
    ("left_out", "1 when it failed too often and is not picked for a while.", lambda state: state.is_left_out),
    ("in_flight_requests", "This router's requests there.", lambda state: state.num_in_flight),
    (
        "in_flight_tokens",
        "Tokens these had to compute when they came, of their outputs only what counts for a pick.",
        lambda state: state.num_in_flight_tokens,
    ),
    ("waiting_sequences", "Sequences waiting, as the engine says.", lambda state: state.load.num_waiting),
    ("running_sequences", "Sequences running, as the engine says.", lambda state: state.load.num_running),
    ("free_kv_blocks", "KV blocks free, as the engine says.", lambda state: state.load.num_free_blocks),
)
