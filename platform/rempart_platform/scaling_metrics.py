"""What an autoscaler asks of a router, per model: how much waits and runs, though there may be no engine to ask.

Tokens of a request are its prompt and, of each choice, what counts as output at most: what engines will have to
compute, not what was reserved. Every configured model has its gauges from the start, at 0.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from prometheus_client import CollectorRegistry, Gauge

from rempart_platform.endpoints.pick import PickConfig
from rempart_platform.generation import GenerationRequest


class ScalingMetrics:
    """Gauges by model of this router's requests.

    Args:
        registry: where they are registered.
        max_counted_output_tokens: of one choice, as for a pick.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        max_counted_output_tokens: int = PickConfig().max_counted_output_tokens,
    ) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ("model",), registry=registry)

        self._max_counted_output_tokens = max_counted_output_tokens
        self._held = gauge("rempart_requests_held", "Requests that wait for a first engine of their model.")
        self._waiting = gauge("rempart_model_waiting_tokens", "Tokens of requests that wait for an engine or a place.")
        self._running = gauge("rempart_model_running_tokens", "Tokens of requests that have a place in an engine.")

    def expose(self, models: Iterable[str]) -> None:
        """Shows these models, though nothing was asked of them yet."""
        for model in models:
            for gauge in (self._held, self._waiting, self._running):
                gauge.labels(model)

    def held(self, model: str) -> AbstractContextManager[None]:
        """Counts a request until the block is left."""
        return _counted(self._held.labels(model), 1)

    def waiting(self, request: GenerationRequest) -> AbstractContextManager[None]:
        """Counts its tokens until the block is left."""
        return _counted(self._waiting.labels(request.model), self._tokens(request))

    def began(self, request: GenerationRequest) -> None:
        """It has a place."""
        self._running.labels(request.model).inc(self._tokens(request))

    def left(self, request: GenerationRequest) -> None:
        """The counterpart of `began`."""
        self._running.labels(request.model).dec(self._tokens(request))

    def _tokens(self, request: GenerationRequest) -> int:
        num_output_tokens = min(request.sampling.max_tokens, self._max_counted_output_tokens)
        return len(request.prompt_token_ids) + request.num_choices * num_output_tokens


@contextmanager
def _counted(gauge: Gauge, amount: float) -> Iterator[None]:
    gauge.inc(amount)
    try:
        yield
    finally:
        gauge.dec(amount)
