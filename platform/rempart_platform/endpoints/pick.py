"""Which endpoint gets a request: filter -> score -> the lowest score, a fair draw among equals.

Pure: states in, one of them out. Nothing here knows a connection or a clock.
"""

import random
from collections.abc import Collection, Iterable

from rempart_platform.endpoints.load import EndpointState


def can_take(state: EndpointState, model: str) -> bool:
    """Whether the endpoint may be given a new request for the model."""
    return state.is_ready and not state.is_draining and state.model is not None and state.model.name == model


def load_score(state: EndpointState) -> float:
    """How much work stands before a new request, in shares of the endpoint's KV capacity. Lower is better.

    Three terms: tokens this router has in flight there (known at once, though an upper bound), KV blocks in use and
    tokens waiting (pushed by the engine, other routers' included). A sequence that waits is a sign that the engine
    is full, whatever its blocks say, so each counts like one block more.
    """
    load = state.load
    block_size = state.model.block_size if state.model is not None else 1
    used_tokens = (load.num_blocks - load.num_free_blocks + load.num_waiting) * block_size
    capacity = max(load.num_blocks * block_size, 1)
    return (state.num_in_flight_tokens + load.num_waiting_tokens + used_tokens) / capacity


def pick(
    states: Iterable[EndpointState], model: str, rng: random.Random, avoid: Collection[str] = ()
) -> EndpointState | None:
    """The endpoint for the next request of a model, or None when none can take it.

    Args:
        states: all endpoints.
        model: name of the model that must be served.
        rng: draws among endpoints of equal score, so that idle endpoints share alike.
        avoid: addresses that already failed this request.
    """
    candidates = [state for state in states if can_take(state, model) and state.address not in avoid]
    if not candidates:
        return None
    scores = [load_score(state) for state in candidates]
    lowest = min(scores)
    return rng.choice([state for state, score in zip(candidates, scores, strict=True) if score == lowest])
