import random
from collections import Counter
from dataclasses import replace

import pytest

from rempart_platform.endpoints.load import EndpointLoad, EndpointModel, EndpointState
from rempart_platform.endpoints.pick import PickConfig, fullness, pick, work_tokens
from rempart_platform.endpoints.static import parse_addresses

MODEL = EndpointModel("m", max_model_len=4096, vocab_size=512, eos_token_ids=(0,), block_size=64)
MODEL_OF_16_ROWS = replace(MODEL, max_num_rows=16)
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
        endpoint("a:1", is_left_out=True),
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
    assert work_tokens(busier) > work_tokens(idle) == 0
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


def test_an_endpoint_that_is_lightly_loaded_and_has_the_prefix_is_picked_before_an_idle_one() -> None:
    warm, idle = endpoint("a:1", num_in_flight_tokens=1999), endpoint("b:1")
    picks = [pick([warm, idle], "m", random.Random(seed), cached_tokens={"a:1": 2000}) for seed in range(20)]
    assert picks == [warm] * 20
    assert {pick([warm, idle], "m", random.Random(seed)) for seed in range(20)} == {idle}


@pytest.mark.parametrize(
    "hot",
    [
        endpoint("a:1", num_in_flight_tokens=2001),
        endpoint("a:1", load=replace(IDLE, num_free_blocks=68)),
        endpoint("a:1", load=replace(IDLE, num_waiting_tokens=2001)),
        endpoint("a:1", load=replace(IDLE, num_waiting=32)),
    ],
)
def test_an_endpoint_with_more_work_than_its_prefix_saves_sheds_the_request(hot: EndpointState) -> None:
    idle = endpoint("b:1")
    assert all(pick([hot, idle], "m", random.Random(seed), cached_tokens={"a:1": 2000}) == idle for seed in range(20))


def test_a_tie_of_work_and_prefix_is_drawn() -> None:
    rng = random.Random(7)
    states = [endpoint("a:1", num_in_flight_tokens=640), endpoint("b:1")]
    picks = Counter(
        picked.address
        for _ in range(2000)
        if (picked := pick(states, "m", rng, cached_tokens={"a:1": 640})) is not None
    )
    assert all(900 < picks[address] < 1100 for address in ("a:1", "b:1"))


def test_the_prefix_of_an_endpoint_that_cannot_take_the_request_counts_nothing() -> None:
    states = [endpoint("a:1", is_left_out=True), endpoint("b:1"), endpoint("c:1", num_in_flight_tokens=1)]
    picked = pick(states, "m", random.Random(0), avoid=["b:1"], cached_tokens={"a:1": 2000, "b:1": 1000})
    assert picked == states[2]


def test_a_bad_number_of_failures_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="failures_to_leave_out"):
        PickConfig(failures_to_leave_out=0)


def test_addresses_come_in_order() -> None:
    assert parse_addresses("127.0.0.1:1, engine-0.engines:50051") == ("127.0.0.1:1", "engine-0.engines:50051")


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536", "a:1,", "a:1,a:1"])
def test_a_malformed_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="endpoint '"):
        parse_addresses(text)


def test_what_is_less_full_comes_before_a_cached_prefix_and_less_work() -> None:
    def state(name: str, num_running: int, num_waiting: int = 0, num_in_flight: int = 0) -> EndpointState:
        used = {"roomy": 90, "nearly": 10}.get(name, 0)
        load = EndpointLoad(num_waiting, num_running, num_blocks=100, num_free_blocks=100 - used)
        return EndpointState(name, MODEL_OF_16_ROWS, is_ready=True, load=load, num_in_flight=num_in_flight)

    roomy, nearly, ours, full = state("roomy", 13), state("nearly", 14), state("ours", 0, 0, 15), state("full", 15, 1)
    assert [fullness(each) for each in (roomy, nearly, ours, full)] == [0, 1, 1, 2]
    assert fullness(endpoint("unknown:1", load=EndpointLoad(num_running=500))) == 0
    cached = {"full": 4000}
    for states, expected in (((full, ours, nearly, roomy), roomy), ((full, ours, nearly), ours), ((full,), full)):
        assert pick(states, "m", random.Random(1), cached_tokens=cached) == expected
