from dataclasses import replace

import pytest

from rempart_platform.endpoints.capacity import Capacities, Capacity, CapacityRules, capacity_of
from rempart_platform.endpoints.load import EndpointLoad, EndpointModel, EndpointState

MODEL = EndpointModel("m", max_model_len=4096, vocab_size=512, eos_token_ids=(0,), block_size=64)
IDLE = EndpointState("a:1", MODEL, is_ready=True, load=EndpointLoad(num_free_blocks=100, num_blocks=100))
RULES = CapacityRules(rows_per_endpoint=32, rows_ahead=4, token_overcommit=2.0)


def test_endpoints_that_can_take_requests_add_up() -> None:
    other = replace(IDLE, model=replace(MODEL, name="other"))
    lost = replace(IDLE, is_ready=False)
    draining = replace(IDLE, load=replace(IDLE.load, is_draining=True))
    assert capacity_of([IDLE, other, lost, draining, IDLE], "m", RULES) == Capacity(
        64, 2 * 100 * 64 * 2, 4, 2 * (12800 * 2 // 32)
    )
    assert capacity_of([other, lost], "m", RULES) == Capacity(0, 0)


@pytest.mark.parametrize(
    ("num_running", "num_waiting", "full_rows", "rows"),
    [
        (9, 0, 0, 32),  # nobody knows yet how many it runs
        (9, 1, 9, 13),
        (0, 50, 0, 4),
        (40, 3, 40, 32),
        (2, 0, 9, 13),
        (11, 0, 9, 15),
    ],
)
def test_an_endpoint_that_was_full_gets_only_what_keeps_it_busy(
    num_running: int, num_waiting: int, full_rows: int, rows: int
) -> None:
    load = replace(IDLE.load, num_running=num_running, num_waiting=num_waiting)
    assert capacity_of([replace(IDLE, load=load, full_rows=full_rows)], "m", RULES).rows == rows


def test_an_endpoint_that_tells_its_rows_is_given_no_more_but_what_keeps_it_busy() -> None:
    told = replace(IDLE, model=replace(MODEL, max_num_rows=20))
    reserved = 2 + 4  # half the root of what runs, and what would wait before whoever comes later
    assert capacity_of([told], "m", RULES) == Capacity(24, 12800, reserved, 1280)
    full = replace(told, load=replace(IDLE.load, num_running=20, num_waiting=3), full_rows=20)
    assert capacity_of([full], "m", RULES) == Capacity(24, 12800, reserved, 1280)
    many = replace(IDLE, model=replace(MODEL, max_num_rows=1000))
    assert capacity_of([many], "m", RULES).rows == 32


def test_where_blocks_are_what_is_full_more_may_be_tried() -> None:
    told = replace(IDLE, model=replace(MODEL, max_num_rows=20))
    of_long_ones = replace(told, load=replace(IDLE.load, num_running=5), full_rows=10)
    capacity = capacity_of([of_long_ones], "m", RULES)
    assert (capacity.rows, capacity.reserved_rows) == (14, 1)
    assert capacity.rows - capacity.reserved_rows > of_long_ones.full_rows


def test_nothing_is_reserved_where_nothing_shall_be() -> None:
    capacity = capacity_of([replace(IDLE, model=replace(MODEL, max_num_rows=20))], "m", replace(RULES, reserve=0.0))
    assert capacity == Capacity(24, 12800)


@pytest.mark.parametrize(("rows", "reserved"), [(1, 0), (2, 1 + 4), (4, 2 + 4)])
def test_the_largest_reserve_leaves_a_row(rows: int, reserved: int) -> None:
    few = replace(IDLE, model=replace(MODEL, max_num_rows=rows))
    assert capacity_of([few], "m", replace(RULES, reserve=1.0)).reserved_rows == reserved


def test_a_sum_stands_for_a_while_and_for_one_model() -> None:
    states, now = [IDLE], [0.0]
    capacities = Capacities(lambda: states, replace(RULES, lasts_s=0.5), lambda: now[0])
    assert capacities.of("m") == capacity_of([IDLE], "m", RULES)
    states.append(replace(IDLE, model=replace(MODEL, name="other")))
    states.append(IDLE)
    assert capacities.of("other").rows == 32
    now[0] = 0.4
    assert capacities.of("m").rows == 32
    now[0] = 0.5
    assert capacities.of("m").rows == 64


@pytest.mark.parametrize(
    "changes", [{"reserve": 1.5}, {"rows_per_endpoint": 0}, {"rows_ahead": 0}, {"token_overcommit": 0.0}]
)
def test_rules_that_would_grant_nothing_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(RULES, **changes)  # type: ignore[arg-type]  # the tests name its fields
