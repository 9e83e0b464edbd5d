"""Which endpoint gets a request: filter -> score -> the lowest score, a fair draw among equals.

Pure: states in, one of them out. Nothing here knows a connection or a clock.
"""

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from rempart_platform.bounds import require_positive
from rempart_platform.endpoints.load import EndpointState


@dataclass(frozen=True, slots=True)
class PickConfig:
    """What a router remembers and expects of its endpoints."""

    max_prefixes: int = 65_536
    """Prefixes of whole blocks that are remembered of each endpoint, at most 200 bytes each; 0 picks by load alone."""
    max_counted_output_tokens: int = 256
    """Output of one choice that counts as work at most. Most outputs end long before the `max_tokens` that was asked
    for, and one request that asks for many would outweigh every prefix."""
    failures_to_leave_out: int = 5
    """Attempts in a row that an endpoint could not even begin, after which it is left out."""
    left_out_s: float = 2.0
    """For how long, before one request probes it."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("max_prefixes", "max_counted_output_tokens", "left_out_s"))


@dataclass(frozen=True, slots=True)
class PickRequest:
    """What a choice of endpoint depends on. `max_output_tokens` is of one choice."""

    model: str
    prompt_token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""
    max_output_tokens: int = 0
    num_choices: int = 1


def serves(state: EndpointState, model: str) -> bool:
    """Whether the endpoint is ready for requests for the model, and not about to go."""
    return state.is_ready and not state.is_draining and state.model is not None and state.model.name == model


def can_take(state: EndpointState, model: str) -> bool:
    """Whether the endpoint may be given a new request for the model."""
    return serves(state, model) and not state.is_left_out


def work_tokens(state: EndpointState) -> int:
    """Tokens of work that stand before a new request. Lower is better.

    Three terms: what this router has in flight there (known at once), KV blocks in use and tokens waiting (pushed by
    the engine, other routers' included). A sequence that waits is a sign that the engine is full, whatever its blocks
    say, so each counts like one block more.
    """
    load = state.load
    used_blocks = load.num_blocks - load.num_free_blocks + load.num_waiting
    return state.num_in_flight_tokens + load.num_waiting_tokens + used_blocks * _block_size(state)


class Fullness(IntEnum):
    """How full of sequences an endpoint is, as far as it is known."""

    ROOMY = 0
    NEARLY_FULL = 1
    """It has no more free rows than the fair queue keeps for tenants that come now and then."""
    FULL = 2
    """A new request would wait until another ends."""


def fullness(state: EndpointState) -> Fullness:
    """ROOMY where the endpoint does not tell its rows."""
    most = state.model.max_num_rows if state.model is not None else 0
    num_free = most - max(state.load.num_running + state.load.num_waiting, state.num_in_flight)
    if most == 0 or num_free > math.isqrt(most) // 2:
        return Fullness.ROOMY
    return Fullness.NEARLY_FULL if num_free > 0 else Fullness.FULL


def pick(
    states: Iterable[EndpointState],
    model: str,
    rng: random.Random,
    *,
    avoid: Collection[str] = (),
    cached_tokens: Mapping[str, int] | None = None,
) -> EndpointState | None:
    """The endpoint for the next request of a model, or None when none can take it.

    The least full come first: the fair queue lets a request go because there is a free row somewhere. The score is in
    tokens: the work before the request, and what of its prompt is not cached. A token of work counts
    the more, the smaller the endpoint's KV capacity is beside the largest one's.

    Args:
        states: all endpoints.
        model: name of the model that must be served.
        rng: draws among endpoints of equal score, so that idle endpoints share alike.
        avoid: addresses that already failed this request.
        cached_tokens: tokens of the prompt that an address is expected to have cached; 0 for others.
    """
    candidates = [state for state in states if can_take(state, model) and state.address not in avoid]
    if not candidates:
        return None
    candidates = _lowest(candidates, [fullness(state) for state in candidates])
    cached = cached_tokens or {}
    capacities = [_capacity(state) for state in candidates]
    largest = max(capacities)
    # The prompt is equally long everywhere: what is cached is taken off instead of adding what is not.
    scores = [
        work_tokens(state) * largest / capacity - cached.get(state.address, 0)
        for state, capacity in zip(candidates, capacities, strict=True)
    ]
    return rng.choice(_lowest(candidates, scores))


def _lowest(states: Sequence[EndpointState], scores: Sequence[float]) -> list[EndpointState]:
    lowest = min(scores)
    return [state for state, score in zip(states, scores, strict=True) if score == lowest]


def _capacity(state: EndpointState) -> int:
    return max(state.load.num_blocks * _block_size(state), 1)


def _block_size(state: EndpointState) -> int:
    return state.model.block_size if state.model is not None else 1
