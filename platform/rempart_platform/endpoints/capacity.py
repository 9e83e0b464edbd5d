"""How much work the endpoints of a model take at a time, all routers' together: what the fair queue grants of."""

from collections.abc import Iterable
from dataclasses import dataclass

from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.pick import can_take


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rows are sequences at a time; tokens are the most that these may come to. (0, 0): no endpoint is seen."""

    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CapacityRules:
    """How the load of an endpoint tells its capacity."""

    rows_per_endpoint: int = 256
    """The most sequences an endpoint is given; fewer once it was seen how many it runs when it is full."""
    rows_ahead: int = 8
    """Sequences that may wait in a full endpoint, so that a row that is freed there is never without work. What waits
    there is in no order of ours: the fewer, the fairer."""
    token_overcommit: float = 4.0
    """Tokens granted for each that the KV blocks hold: most requests end long before their worst case."""

    def __post_init__(self) -> None:
        if self.rows_per_endpoint < 1 or self.rows_ahead < 1:
            raise ValueError("rows_per_endpoint and rows_ahead must be at least 1")
        if not self.token_overcommit > 0:
            raise ValueError("token_overcommit must be above 0")


def capacity_of(states: Iterable[EndpointState], model: str, rules: CapacityRules) -> Capacity:
    """What all endpoints that can take requests for the model take together."""
    rows, tokens = 0, 0
    for state in states:
        if not can_take(state, model):
            continue
        assert state.model is not None  # or it could not take any
        rows += min(_rows_of(state, rules), rules.rows_per_endpoint)
        tokens += round(state.load.num_blocks * state.model.block_size * rules.token_overcommit)
    return Capacity(rows, tokens)


def _rows_of(state: EndpointState, rules: CapacityRules) -> int:
    load = state.load
    if load.num_waiting > 0:
        return load.num_running + rules.rows_ahead
    if state.full_rows > 0:
        # It may run more than when it was full of longer ones, and then this grows.
        return max(state.full_rows, load.num_running) + rules.rows_ahead
    return rules.rows_per_endpoint
