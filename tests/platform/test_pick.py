import random
from collections import Counter
from dataclasses import replace

import pytest

from rempart_platform.endpoints.load import EndpointLoad, EndpointModel, EndpointState
from rempart_platform.endpoints.pick import load_score, pick
from rempart_platform.endpoints.static import parse_addresses

MODEL = EndpointModel("m", max_model_len=4096, vocab_size=512, eos_token_ids=(0,), block_size=64)
IDLE = EndpointLoad(num_free_blocks=100, num_blocks=100)


def endpoint(address: str, **changes: object) -> EndpointState:
    state = EndpointState(address, MODEL, is_ready=True, load=IDLE)
    return replace(state, **changes)  # type: ignore[arg-type]  # the tests name fields of the dataclass


@pytest.mark.parametrize(
    "unfit",
    [
        endpoint("a:1", is_ready=False),
        endpoint("a:1", model=None),
        endpoint("a:1", model=replace(MODEL, name="other")),
        endpoint("a:1", load=replace(IDLE, is_draining=True)),
    ],
)
def test_an_endpoint_that_cannot_take_the_request_is_never_picked(unfit: EndpointState) -> None:
    assert pick([unfit], "m", random.Random(0)) is None
    fit = endpoint("b:1", num_in_flight_tokens=10**6)
    assert pick([unfit, fit], "m", random.Random(0)) == fit


def test_an_endpoint_that_failed_this_request_is_avoided() -> None:
    states = [endpoint("a:1"), endpoint("b:1", num_in_flight_tokens=5000)]
    picked = pick(states, "m", random.Random(0), avoid=["a:1"])
    assert picked is not None
    assert picked.address == "b:1"
    assert pick(states, "m", random.Random(0), avoid=["a:1", "b:1"]) is None


@pytest.mark.parametrize(
    "busier",
    [
        endpoint("a:1", num_in_flight_tokens=1),
        endpoint("a:1", load=replace(IDLE, num_free_blocks=99)),
        endpoint("a:1", load=replace(IDLE, num_waiting=1)),
        endpoint("a:1", load=replace(IDLE, num_waiting_tokens=1)),
    ],
)
def test_the_less_busy_endpoint_is_picked_whatever_keeps_the_other_busy(busier: EndpointState) -> None:
    idle = endpoint("b:1")
    assert load_score(busier) > load_score(idle)
    assert all(pick([busier, idle], "m", random.Random(seed)) == idle for seed in range(20))


def test_equal_endpoints_share_alike() -> None:
    rng = random.Random(7)
    states = [endpoint(f"{name}:1") for name in "abcd"]
    counts = Counter(picked.address for _ in range(4000) if (picked := pick(states, "m", rng)) is not None)
    assert sum(counts.values()) == 4000
    assert all(850 < count < 1150 for count in counts.values())


def test_a_large_endpoint_takes_more_than_a_small_one() -> None:
    small = endpoint("a:1", num_in_flight_tokens=2000)
    large = endpoint("b:1", num_in_flight_tokens=3000, load=EndpointLoad(num_free_blocks=1000, num_blocks=1000))
    assert pick([small, large], "m", random.Random(0)) == large


def test_addresses_come_in_order() -> None:
    assert parse_addresses("127.0.0.1:1, engine-0.engines:50051") == ("127.0.0.1:1", "engine-0.engines:50051")


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536", "a:1,", "a:1,a:1"])
def test_a_malformed_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="endpoint '"):
        parse_addresses(text)
