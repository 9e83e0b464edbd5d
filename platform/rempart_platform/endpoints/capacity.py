"""How much work the endpoints of a model take at a time, all routers' together: what the fair queue grants of."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rempart_platform.bounds import require, require_positive
from rempart_platform.endpoints.load import EndpointModel, EndpointState
from rempart_platform.endpoints.pick import can_take


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rows are sequences at a time; tokens are the most that these may come to. (0, 0): no endpoint is seen."""

    rows: int
    tokens: int
    reserved_rows: int = 0
    """Those of `rows` that are for tenants that hold no more than these, or than the rest where that is less, where
    several tenants are served."""
    reserved_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CapacityRules:
    """How the load of an endpoint tells its capacity."""

    rows_per_endpoint: int = 256
    """The most sequences an endpoint is given; fewer when it says, or was seen, to run fewer at a time."""
    rows_ahead: int = 4
    """Sequences that may wait in a full endpoint, so that a row that is freed there is never without work. What waits
    there is in no order of ours: the fewer, the fairer."""
    token_overcommit: float = 4.0
    """Tokens granted for each that the KV blocks hold: most requests end long before their worst case."""
    reserve: float = 0.5
    """So many times the square root of an endpoint's rows, and as large a part of its tokens, are kept while several
    tenants are served, for those that hold no more than that: one that comes now and then need not wait until a request
    of one that floods ends. 1 row of 4, 4 of 64, 8 of 256, as chance meetings grow with the root; 0 keeps nothing."""

    lasts_s: float = 0.05
    """For how long a sum over all endpoints stands. Each request asks for it twice, and it takes time by endpoint."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("reserve", "lasts_s"))
        require(self.reserve <= 1, "reserve", "between 0 and 1")


class Capacities:
    """The capacity of each model, as it was at most `rules.lasts_s` ago.

    Args:
        states: all endpoints at this moment.
        rules: how their loads tell it.
        clock: monotonic seconds.
    """

    def __init__(
        self, states: Callable[[], Iterable[EndpointState]], rules: CapacityRules, clock: Callable[[], float]
    ) -> None:
        self._states = states
        self._rules = rules
        self._clock = clock
        self._sums: dict[str, tuple[float, Capacity]] = {}

    def of(self, model: str) -> Capacity:
        """Of the endpoints that can take requests for the model."""
        now = self._clock()
        until, capacity = self._sums.get(model, (now, Capacity(0, 0)))
        if until <= now:
            capacity = capacity_of(self._states(), model, self._rules)
            self._sums[model] = now + self._rules.lasts_s, capacity
        return capacity


def capacity_of(states: Iterable[EndpointState], model: str, rules: CapacityRules) -> Capacity:
    """What all endpoints that can take requests for the model take together."""
    rows, tokens, reserved_rows, reserved_tokens = 0, 0, 0, 0
    for state in states:
        if not can_take(state, model):
            continue
        assert state.model is not None  # or it could not take any
        here = _capacity_of(state, state.model, rules)
        rows, tokens = rows + here.rows, tokens + here.tokens
        reserved_rows, reserved_tokens = reserved_rows + here.reserved_rows, reserved_tokens + here.reserved_tokens
    return Capacity(rows, tokens, reserved_rows, reserved_tokens)


def _capacity_of(state: EndpointState, model: EndpointModel, rules: CapacityRules) -> Capacity:
    load, most = state.load, min(model.max_num_rows or rules.rows_per_endpoint, rules.rows_per_endpoint)
    running = most
    if load.num_waiting > 0:
        running = min(load.num_running, most)
    elif state.full_rows > 0:
        # It may run more than when it was full of longer ones, and then this grows.
        running = min(max(state.full_rows, load.num_running), most)
    rows = min(running + rules.rows_ahead, rules.rows_per_endpoint)
    reserved = min(math.floor(rules.reserve * math.sqrt(running)), max(running - 1, 0))  # never all of them
    tokens = round(load.num_blocks * model.block_size * rules.token_overcommit)
    reserved_tokens = tokens * reserved // max(running, 1)
    if reserved and running == most:
        # What waits in a full endpoint is before all that come later. Where its blocks are what is full, nobody knows
        # how many it could run, and only what waits there tells.
        reserved += rows - running
    return Capacity(rows, tokens, reserved, reserved_tokens)
