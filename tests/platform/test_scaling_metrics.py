"""What an autoscaler reads is the work that is to come: outputs as long as they have been of late."""

from prometheus_client import CollectorRegistry

from rempart_platform.generation import Caller, GenerationRequest
from rempart_platform.request_trace import RequestTrace
from rempart_platform.scaling_metrics import ScalingMetrics
from rempart_protos.v1 import sampling_pb2

PROMPT = (1, 2, 3)


class Model:
    """Requests of one model of a router."""

    def __init__(self, metrics: ScalingMetrics, registry: CollectorRegistry, name: str = "m") -> None:
        self.metrics = metrics
        self._registry = registry
        self._name = name
        self._num_requests = 0
        metrics.expose([name])

    def ask(self, max_tokens: int, num_choices: int = 1) -> RequestTrace:
        """A request that has a place."""
        self._num_requests += 1
        sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens, n=num_choices)
        request = GenerationRequest(
            f"{self._name}-{self._num_requests}", Caller("t", "k"), self._name, PROMPT, sampling
        )
        self.metrics.began(request)
        return RequestTrace(request, 0.0)

    def end(self, trace: RequestTrace, num_tokens: int, *, is_complete: bool = True) -> None:
        """It ends with so many tokens of all its choices."""
        trace.num_completion_tokens, trace.is_complete = num_tokens, is_complete
        self.metrics.left(trace)

    @property
    def running(self) -> float:
        value = self._registry.get_sample_value("rempart_model_running_tokens", {"model": self._name})
        assert value is not None
        return value

    def expected(self) -> float:
        """Output tokens that count for one choice of a request that asks for many."""
        before, trace = self.running, self.ask(100_000)
        counted = self.running - before
        self.end(trace, 0, is_complete=False)
        return counted - len(PROMPT)


def model() -> Model:
    registry = CollectorRegistry()
    return Model(ScalingMetrics(registry), registry)


def test_a_request_counts_what_it_asks_for_where_that_is_less_than_is_expected() -> None:
    asked = model()
    short, long = asked.ask(10, num_choices=2), asked.ask(4096, num_choices=2)
    assert asked.running == 2 * len(PROMPT) + 2 * 10 + 2 * 256
    asked.end(short, 20)
    asked.end(long, 5000)
    assert asked.running == 0


def test_what_is_expected_follows_what_is_delivered() -> None:
    asked = model()
    for _ in range(400):
        asked.end(asked.ask(8192, num_choices=2), 2 * 3000)
    assert abs(asked.expected() - 3000) <= 5, "a model that reasons"
    for _ in range(400):
        asked.end(asked.ask(8192), 40)
    assert abs(asked.expected() - 40) <= 5


def test_what_was_counted_is_taken_back_whatever_ended_meanwhile() -> None:
    asked = model()
    running = [asked.ask(8192) for _ in range(3)]
    for _ in range(50):
        asked.end(asked.ask(8192), 7)
    for trace in running:
        asked.end(trace, 1)
    assert asked.running == 0, "an autoscaler stops the last engine at exactly 0"


def test_what_broke_off_teaches_nothing() -> None:
    asked = model()
    for _ in range(100):
        asked.end(asked.ask(8192), 0, is_complete=False)
    assert asked.expected() == 256


def test_models_differ() -> None:
    registry = CollectorRegistry()
    metrics = ScalingMetrics(registry)
    brief, other = Model(metrics, registry, "brief"), Model(metrics, registry, "other")
    for _ in range(400):
        brief.end(brief.ask(8192), 5)
    assert brief.expected() <= 10
    assert other.expected() == 256
