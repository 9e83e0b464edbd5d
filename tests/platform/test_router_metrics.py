from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from rempart_platform.endpoints.load import EndpointLoad, EndpointModel, EndpointState
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.generation import Caller, Delta, Finished, FinishReason, GenerationRequest, ServiceTier
from rempart_platform.metrics import BoundedLabel, EndpointCollector, QueueMetrics, QuotaMetrics, RouterMetrics
from rempart_platform.request_trace import RequestTrace
from rempart_platform.tenancy.fair_queue import QueueObserver
from rempart_platform.tenancy.queue_values import ClassSnapshot, Place, QueueRequest, QueueSnapshot
from rempart_platform.tenancy.quota import LedgerObserver
from rempart_protos.v1 import sampling_pb2


def trace(tenant: str = "acme", num_choices: int = 1) -> RequestTrace:
    sampling = sampling_pb2.SamplingParams(max_tokens=10, seed=1, n=num_choices)
    return RequestTrace(GenerationRequest("r", Caller(tenant, "k"), "m", (1, 2, 3), sampling), started_s=10.0)


def test_labels_are_bounded() -> None:
    label = BoundedLabel(2)
    assert [label(name) for name in ("a", "b", "c", "a", "d", "b")] == ["a", "b", "other", "a", "other", "b"]
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, max_tenants=3)
    for number in range(100):
        metrics.request_ended(trace(f"tenant-{number}"))
    series = [line for line in generate_latest(registry).decode().splitlines() if "requests_total{" in line]
    assert len(series) == 4
    assert any('tenant="other"' in line and line.endswith(" 97.0") for line in series)


def test_a_whole_request_is_measured() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    request = trace()
    metrics.request_admitted(request)
    assert registry.get_sample_value("rempart_router_requests_in_flight", {"model": "m"}) == 1
    request.dispatched("a:1", 10.25, num_expected_cached_tokens=1)
    request.engine_began(num_cached_tokens=2, now_s=10.5)
    request.delivered(Delta(0, "x", (1,)), 11.0)
    request.delivered(Delta(0, "yz", (2, 3)), 13.0)
    request.delivered(Finished(0, FinishReason.STOP), 13.0)
    request.is_complete = True
    request.ended_s = 14.0
    metrics.request_left(request, cost_nanos=1_500_000)
    metrics.request_ended(request)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"rempart_router_{name}", {"model": "m", **labels})

    assert value("requests_in_flight") == 0
    assert value("requests_total", tenant="acme", outcome="ok") == 1
    assert value("queue_time_seconds_sum") == 0.25
    assert value("dispatch_time_seconds_sum") == 0.25
    assert value("time_to_first_token_seconds_sum") == 1.0
    assert value("time_per_output_token_seconds_sum") == 1.0
    assert value("request_duration_seconds_sum") == 4.0
    assert value("prompt_tokens_total", tenant="acme") == 3
    assert value("completion_tokens_total", tenant="acme") == 3
    assert value("cached_tokens_total", tenant="acme") == 2
    assert value("expected_cached_tokens_total") == 1
    assert value("cost_total", tenant="acme") == 0.0015
    for state, count in (("reserved", 13), ("settled", 6), ("refunded", 7)):
        labels = {"tenant": "acme", "state": state}
        assert registry.get_sample_value("rempart_router_quota_tokens_total", labels) == count


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RempartError(ErrorKind.RATE_LIMIT_EXCEEDED, "", violation=QuotaViolation("acme", "tokens", 5)), "tokens"),
        (RempartError(ErrorKind.UNAVAILABLE, ""), "service_unavailable"),
    ],
)
def test_rejections_are_counted_by_reason_and_are_no_latency(error: RempartError, reason: str) -> None:
    registry = CollectorRegistry()
    request = trace()
    request.failed(error)
    RouterMetrics(registry).request_ended(request)
    labels = {"model": "m", "reason": reason}
    assert registry.get_sample_value("rempart_router_rejections_total", labels) == 1
    of_tenant = {"tenant": "acme", "reason": reason}
    assert registry.get_sample_value("rempart_router_tenant_rejections_total", of_tenant) == 1
    assert registry.get_sample_value("rempart_router_queue_time_seconds_count", {"model": "m"}) is None


def test_time_per_token_needs_two_tokens_a_choice() -> None:
    request = trace(num_choices=2)
    request.delivered(Delta(0, "x", (1,)), 11.0)
    request.delivered(Delta(1, "y", (2,)), 12.0)
    assert request.time_per_output_token_s is None
    request.delivered(Delta(0, "x", (1,)), 13.0)
    request.delivered(Delta(1, "y", (2,)), 14.0)
    assert request.time_per_output_token_s == 3.0


def test_the_first_reason_of_an_end_is_kept() -> None:
    request = trace()
    assert request.outcome == "client_closed_request"
    request.failed(RempartError(ErrorKind.DEADLINE_EXCEEDED, ""))
    request.failed(ConnectionResetError())
    assert request.outcome == "deadline_exceeded"
    unexpected = trace()
    unexpected.failed(ZeroDivisionError())
    assert unexpected.outcome == "internal_error"


def test_endpoints_are_read_at_the_scrape() -> None:
    model = EndpointModel("m", max_model_len=1, vocab_size=1, eos_token_ids=(), block_size=64)
    state = EndpointState("a:1", model, is_ready=True, load=EndpointLoad(num_waiting=2, num_free_blocks=7))
    states = [state]
    registry = CollectorRegistry()
    registry.register(EndpointCollector(lambda: states))

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"rempart_router_endpoint_{name}", {"endpoint": "a:1", "model": "m"})

    assert (value("ready"), value("waiting_sequences"), value("free_kv_blocks")) == (1, 2, 7)
    assert value("left_out") == 0
    states[0] = replace(state, load=EndpointLoad(is_draining=True), num_in_flight=3, is_left_out=True)
    assert (value("ready"), value("draining"), value("in_flight_requests")) == (0, 1, 3)
    assert value("left_out") == 1


def test_the_ledgers_events_are_counted() -> None:
    registry = CollectorRegistry()
    observer: LedgerObserver = QuotaMetrics(RouterMetrics(registry))
    observer.refused("acme", "tokens")
    observer.leases_expired(3)
    observer.ending_lost()
    assert registry.get_sample_value("rempart_router_quota_overgranted_tokens_total") == 0, "it is there to be watched"
    observer.overgranted(20)
    assert registry.get_sample_value("rempart_router_quota_overgranted_tokens_total") == 20
    for event, count in (("refused_tokens", 1), ("lease_expired", 3), ("ending_lost", 1)):
        assert registry.get_sample_value("rempart_router_quota_events_total", {"event": event}) == count


def test_the_fair_queue_is_measured_for_each_tenant_and_as_a_whole() -> None:
    registry = CollectorRegistry()
    observer: QueueObserver = QueueMetrics(RouterMetrics(registry, max_tenants=1))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"rempart_router_{name}", {"model": "m", **labels})

    for tenant in ("acme", "second", "third"):
        observer.entered(tenant, "m")
    assert value("queue_waiting_requests", tenant="acme") == 1
    assert value("queue_waiting_requests", tenant="other") == 2
    observer.left("third", "m")
    for tenant, service_tier, waited_s in (("third", ServiceTier.DEFAULT, 0.3), ("acme", ServiceTier.FLEX, 2.0)):
        asked = QueueRequest("r", tenant, "m", 1, 1, service_tier=service_tier)
        observer.granted(Place(asked, fence=1, waited_s=waited_s))
    assert value("queue_waiting_requests", tenant="other") == 1
    assert value("queue_wait_seconds_sum", tenant="other") == 0.3
    assert value("queue_class_wait_seconds_sum", **{"class": "default"}) == 0.3
    assert value("queue_class_wait_seconds_sum", **{"class": "flex"}) == 2.0
    observer.refused("acme", "m", "tenant_full")
    observer.swept("m", 7)
    assert value("queue_events_total", event="refused_tenant_full") == 1
    assert value("queue_events_total", event="swept") == 7
    classes = {service_tier: ClassSnapshot(int(service_tier), 1, 2.5) for service_tier in ServiceTier}
    observer.looked("m", QueueSnapshot(10, 3, 300, 8, 800, 0.75, 0, False, 0, 0.0, classes))
    assert value("queue_depth", **{"class": "batch"}) == 4
    assert value("queue_virtual_time_lag", **{"class": "priority"}) == 2.5
    assert (value("queue_granted", unit="rows"), value("queue_capacity", unit="tokens")) == (3, 800)
    assert value("queue_jain_index") == 0.75


def test_a_tenant_who_waits_for_nothing_is_told_once_he_was_granted_room() -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry).queue_granted(Place(QueueRequest("r", "acme", "m", 1, 1), 1, 0.5))
    labels = {"model": "m", "tenant": "acme"}
    assert registry.get_sample_value("rempart_router_queue_waiting_requests", labels) == 0
