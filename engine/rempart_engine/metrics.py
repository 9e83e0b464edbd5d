"""Prometheus metrics of an engine: its own names, and those that the Gateway API Inference Extension reads."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, make_wsgi_app, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.core.load import Counters, Load
from rempart_engine.core.request import FinishReason
from rempart_engine.ipc import Ready, StepUpdate

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class EngineMetrics:
    """Counts what the front sees; what the core counts arrives with each step and is read at scrape time."""

    def __init__(self, engine_version: str, limits: Mapping[str, int] = MappingProxyType({})) -> None:
        self.registry = CollectorRegistry()
        self._core = _CoreCollector(engine_version, limits)
        self.registry.register(self._core)
        ProcessCollector(namespace="rempart_engine_front", registry=self.registry)
        self._ended = Counter(
            "rempart_engine_requests", "Choices that ended, by reason", ["finish_reason"], registry=self.registry
        )
        for reason in FinishReason:
            self._ended.labels(reason.value)
        self._prompt_tokens = Counter(
            "rempart_engine_prompt_tokens", "Prompt tokens of requests that got a first token", registry=self.registry
        )
        self._step_s = self._histogram("step_duration", "From the decision on a step to its commit", _STEP_BUCKETS)
        self._ttft_s = self._histogram("time_to_first_token", "From receipt to the first token", _LATENCY_BUCKETS)
        self._e2e_s = self._histogram("e2e", "From receipt to the end of the last choice", _LATENCY_BUCKETS)

    def serve(self, host: str, port: int) -> int:
        """Answer scrapes from a thread of its own; the port, which was picked when `port` is 0.

        Raises:
            OSError: the address cannot be listened on.
        """
        server, _ = start_http_server(port, host, self.registry)
        server.set_app(_as_plain_text(make_wsgi_app(self.registry)))
        return int(server.server_port)

    def set_loaded(self, fraction: float) -> None:
        """How much of the model is loaded, 0 to 1."""
        self._core.loaded = fraction

    def set_manifest(self, digest: str) -> None:
        """The model is as a manifest of this digest says. Without this call it was compared with nothing."""
        self._core.manifest = digest

    def set_model(self, model: Ready) -> None:
        self._core.loaded = 1.0
        self._core.model = model

    def observe_step(self, update: StepUpdate) -> None:
        self._core.load = update.load
        if update.num_tokens:
            self._step_s.observe(update.duration_s)

    def observe_first_token(self, seconds: float, num_prompt_tokens: int) -> None:
        self._ttft_s.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)

    def observe_choice_end(self, reason: FinishReason) -> None:
        self._ended.labels(reason.value).inc()

    def observe_request_end(self, seconds: float) -> None:
        self._e2e_s.observe(seconds)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"rempart_engine_{name}_seconds", text, buckets=buckets, registry=self.registry)


def _as_plain_text(app: "WSGIApplication") -> "WSGIApplication":
    """Answers in Prometheus' text format, whatever is accepted: in OpenMetrics the library calls `vllm:x` `vllm_x`."""

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        return app({**environ, "HTTP_ACCEPT": "text/plain"}, start_response)

    return answer


class _CoreCollector(Collector):
    """Makes metrics of the last load that the core sent. Read by the scraping thread; all fields are whole values."""

    def __init__(self, engine_version: str, limits: Mapping[str, int]) -> None:
        self.model: Ready | None = None
        self.load: Load | None = None
        self.loaded = 0.0
        self.manifest = ""
        self._engine_version = engine_version
        self._limits = limits

    def collect(self) -> Iterator[Metric]:
        model, load = self.model, self.load
        yield GaugeMetricFamily("rempart_engine_loaded_ratio", "Share of the model that is loaded", value=self.loaded)
        limit = GaugeMetricFamily("rempart_engine_limit", "Limits of this engine, by flag", labels=["limit"])
        for name, value in self._limits.items():
            limit.add_metric([name], value)
        yield limit
        if model is not None:
            yield _info("rempart_engine", "What is served", self._model_facts(model))
        if load is not None:
            yield from _load_gauges(load)
            yield from _core_counters(load.num_steps, load.counters)
        if model is not None and load is not None:
            yield from _model_server_gauges(model, load)

    def _model_facts(self, model: Ready) -> dict[str, str]:
        return {
            "model_name": model.model_name,
            "architecture": model.architecture,
            "dtype": model.dtype,
            "engine_version": self._engine_version,
            "manifest": self.manifest,
        }


def _kv_usage(load: Load) -> float:
    return 1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0


def _load_gauges(load: Load) -> Iterator[Metric]:
    for name, text, value in (
        ("waiting", "Choices that wait for KV blocks", load.num_waiting),
        ("running", "Choices that hold KV blocks", load.num_running),
        ("waiting_tokens", "Tokens waiting to be prefilled", load.num_waiting_tokens),
        ("free_blocks", "KV blocks that no sequence holds", load.num_free_blocks),
        ("blocks", "KV blocks in the pool", load.num_blocks),
        ("kv_usage_ratio", "Share of KV blocks that sequences hold", _kv_usage(load)),
    ):
        yield GaugeMetricFamily(f"rempart_engine_{name}", text, value=value)


def _core_counters(num_steps: int, counters: Counters) -> Iterator[Metric]:
    for name, text, total in (
        ("steps", "Steps done", num_steps),
        ("scheduled_tokens", "Tokens computed, prompt and output", counters.num_scheduled_tokens),
        ("generation_tokens", "Output tokens sampled", counters.num_output_tokens),
        ("draft_tokens", "Draft tokens verified", counters.num_draft_tokens),
        ("accepted_draft_tokens", "Draft tokens that became output", counters.num_accepted_draft_tokens),
        ("preemptions", "Sequences that gave their KV blocks back", counters.num_preemptions),
        ("prefix_cache_query_tokens", "Tokens looked for in the prefix cache", counters.num_prefix_cache_query_tokens),
        ("prefix_cache_hit_tokens", "Tokens found in the prefix cache", counters.num_prefix_cache_hit_tokens),
    ):
        yield CounterMetricFamily(f"rempart_engine_{name}", text, value=total)


def _model_server_gauges(model: Ready, load: Load) -> Iterator[Metric]:
    """The names of the model server protocol, so that existing pickers and autoscalers work unchanged."""
    for name, text, value in (
        ("num_requests_waiting", "Choices that wait", load.num_waiting),
        ("num_requests_running", "Choices that run", load.num_running),
        ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", _kv_usage(load)),
    ):
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        gauge.add_metric([model.model_name], value)
        yield gauge
    # The protocol reads a gauge of value 1 called cache_config_info: InfoMetricFamily adds the suffix.
    facts = {"block_size": str(BLOCK_SIZE), "num_gpu_blocks": str(load.num_blocks), "model_name": model.model_name}
    yield _info("vllm:cache_config", "Shape of the KV cache", facts)


def _info(name: str, text: str, facts: dict[str, str]) -> Metric:
    return InfoMetricFamily(name, text, value=facts)
