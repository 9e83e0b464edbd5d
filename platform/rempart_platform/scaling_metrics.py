"""What an autoscaler asks of a router, per model: how much waits and runs, though there may be no engine to ask.

Tokens of a request are its prompt and, of each choice, as many as choices of its model had of late, or its own
`max_tokens` where that is less: what engines will have to compute, not what was reserved. Most outputs end long before
the worst case, while those of a model that reasons are far from short. Every configured model has its gauges from the
start, at 0.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from prometheus_client import CollectorRegistry, Gauge

from rempart_platform.generation import GenerationRequest
from rempart_platform.metric_labels import by_labels
from rempart_platform.request_trace import RequestTrace

_FIRST_EXPECTED = 256
"""Output tokens of a choice, before any has ended."""
_WEIGHT_OF_NEWEST = 0.02
"""In the mean, which so is one of some 50 requests."""


class ScalingMetrics:
    """Gauges by model of this router's requests.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Callable[..., Gauge]:
            return by_labels(Gauge(name, text, ("model",), registry=registry))

        self._mean_output_tokens: dict[str, float] = {}
        """Of a choice, by model."""
        self._began: dict[str, int] = {}
        """What was counted for each request that runs, for by its end the mean is another."""
        self._held = gauge("rempart_requests_held", "Requests that wait for a first engine of their model.")
        self._waiting = gauge("rempart_model_waiting_tokens", "Tokens of requests that wait for an engine or a place.")
        self._running = gauge("rempart_model_running_tokens", "Tokens of requests that have a place in an engine.")

    def expose(self, models: Iterable[str]) -> None:
        """Shows these models, though nothing was asked of them yet."""
        for model in models:
            for gauge in (self._held, self._waiting, self._running):
                gauge(model)

    def held(self, model: str) -> AbstractContextManager[None]:
        """Counts a request until the block is left."""
        return _counted(self._held(model), 1)

    def waiting(self, request: GenerationRequest) -> AbstractContextManager[None]:
        """Counts its tokens until the block is left."""
        return _counted(self._waiting(request.model), self._tokens(request))

    def began(self, request: GenerationRequest) -> None:
        """It has a place."""
        self._began[request.request_id] = num_tokens = self._tokens(request)
        self._running(request.model).inc(num_tokens)

    def left(self, trace: RequestTrace) -> None:
        """The counterpart of `began`."""
        request = trace.request
        self._running(request.model).dec(self._began.pop(request.request_id))
        if trace.is_complete:  # else an engine was lost or the client is gone, which tells of no output's length
            mean = self._expected(request.model)
            newest = trace.num_completion_tokens / request.num_choices
            self._mean_output_tokens[request.model] = mean + _WEIGHT_OF_NEWEST * (newest - mean)

    def _expected(self, model: str) -> float:
        return self._mean_output_tokens.get(model, _FIRST_EXPECTED)

    def _tokens(self, request: GenerationRequest) -> int:
        num_output_tokens = min(request.sampling.max_tokens, math.ceil(self._expected(request.model)))
        return len(request.prompt_token_ids) + request.num_choices * num_output_tokens


@contextmanager
def _counted(gauge: Gauge, amount: float) -> Iterator[None]:
    gauge.inc(amount)
    try:
        yield
    finally:
        gauge.dec(amount)
