"""How much work the endpoints of a model take at a time, all routers' together: what the fair queue grants of."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rempart_platform.endpoints.load import EndpointModel, EndpointState
from rempart_platform.endpoints.pick import can_take


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rows are sequences at a time; tokens are the most that these may come to. (0, 0): no endpoint is seen."""

    rows: int
    tokens: int
    reserved_rows: int = 0
    """Those of `rows` that are for tenants that hold no more than these, where several tenants are served."""
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
    reserved_share: float = 0.05
    """Share of rows and tokens that is kept, while several tenants are served, for those that hold no more than it: one
    that comes now and then need not wait until a request of one that floods ends. 0 keeps nothing."""

    def __post_init__(self) -> None:
        if self.rows_per_endpoint < 1 or self.rows_ahead < 1:
            raise ValueError("rows_per_endpoint and rows_ahead must be at least 1")
        if not self.token_overcommit > 0:
            raise ValueError("token_overcommit must be above 0")
        if not 0 <= self.reserved_share < 1:
            raise ValueError("reserved_share must be at least 0 and below 1")


def capacity_of(states: Iterable[EndpointState], model: str, rules: CapacityRules) -> Capacity:
    """What all endpoints that can take requests for the model take together."""
    rows, tokens, reserved_rows = 0, 0, 0
    for state in states:
        if not can_take(state, model):
            continue
        assert state.model is not None  # or it could not take any
        rows_here, reserved_here = _rows_of(state, state.model, rules)
        rows += rows_here
        reserved_rows += reserved_here
        tokens += round(state.load.num_blocks * state.model.block_size * rules.token_overcommit)
    return Capacity(rows, tokens, reserved_rows, math.ceil(tokens * rules.reserved_share))


def _rows_of(state: EndpointState, model: EndpointModel, rules: CapacityRules) -> tuple[int, int]:
    """Rows of one endpoint, and those of them that are reserved."""
    load, most = state.load, min(model.max_num_rows or rules.rows_per_endpoint, rules.rows_per_endpoint)
    running = most
    if load.num_waiting > 0:
        running = min(load.num_running, most)
    elif state.full_rows > 0:
        # It may run more than when it was full of longer ones, and then this grows.
        running = min(max(state.full_rows, load.num_running), most)
    rows = min(running + rules.rows_ahead, rules.rows_per_endpoint)
    reserved = math.ceil(running * rules.reserved_share)
    if reserved and running == most:
        # What waits in a full endpoint is before all that come later. Where its blocks are what is full, nobody knows
        # how many it could run, and only what waits there tells.
        reserved += rows - running
    return rows, reserved
