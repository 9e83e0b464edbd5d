import pytest

from rempart_engine.core.integrity import IntegrityError
from rempart_engine.core.request import FinishReason, SamplingParams
from rempart_engine.core.sequence import Sequence
from rempart_engine.core.testing import make_request


def make_sequence(
    *,
    num_prompt_tokens: int = 5,
    num_emitted_tokens: int = 0,
    stop_token_ids: frozenset[int] = frozenset({0}),
    max_tokens: int | None = None,
    min_tokens: int = 0,
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    prompt = [9] * (num_prompt_tokens + num_emitted_tokens)
    request = make_request("r", prompt, sampling=sampling, num_emitted_tokens=num_emitted_tokens)
    return Sequence(request, 0, 0, stop_token_ids, 20)


def test_work_samples_exactly_when_it_reaches_the_last_token() -> None:
    sequence = make_sequence()
    assert sequence.num_remaining_tokens == 5
    assert not sequence.schedule(3, step=1)
    assert sequence.num_remaining_tokens == 2
    assert sequence.schedule(2, step=2)


def test_a_token_being_sampled_counts_as_a_token_to_go_on_from() -> None:
    sequence = make_sequence()
    sequence.schedule(5, step=1)
    assert (sequence.num_tokens, sequence.num_remaining_tokens) == (6, 1)
    assert sequence.schedule(1, step=2)
    sequence.land(5, samples=True)
    assert sequence.append((7,)) == (1, None)
    sequence.land(1, samples=True)
    assert sequence.append((8,)) == (1, None)
    assert sequence.token_ids[5:] == [7, 8]
    assert (sequence.num_computed_tokens, sequence.num_remaining_tokens) == (6, 1)


def test_nothing_is_scheduled_beyond_the_last_token_it_may_have() -> None:
    sequence = make_sequence(max_tokens=2)
    sequence.schedule(5, step=1)
    sequence.schedule(1, step=2)
    assert sequence.num_remaining_tokens == 0


def test_a_stop_token_ends_it_and_is_part_of_the_output() -> None:
    sequence = make_sequence(stop_token_ids=frozenset({0, 3}))
    assert sequence.append((4,)) == (1, None)
    assert sequence.append((3,)) == (1, FinishReason.STOP)
    assert sequence.num_output_tokens == 2


def test_tokens_after_the_one_that_ends_it_are_dropped() -> None:
    sequence = make_sequence()
    assert sequence.append((4, 0, 5)) == (2, FinishReason.STOP)
    assert sequence.token_ids[5:] == [4, 0]


def test_max_tokens_ends_it_by_length() -> None:
    sequence = make_sequence(max_tokens=2)
    assert sequence.append((4, 5, 6)) == (2, FinishReason.LENGTH)


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    assert make_sequence(max_tokens=1).append((0,)) == (1, FinishReason.STOP)


def test_the_longest_sequence_ends_one_without_max_tokens() -> None:
    sequence = make_sequence(num_prompt_tokens=18)
    assert sequence.append((4,)) == (1, None)
    assert sequence.append((4,)) == (1, FinishReason.LENGTH)


def test_no_stop_token_ends_it_among_its_min_tokens() -> None:
    sequence = make_sequence(min_tokens=2)
    assert sequence.append((0,)) == (1, None)
    assert sequence.append((0,)) == (1, None)
    assert sequence.append((0,)) == (1, FinishReason.STOP)


def test_emitted_tokens_count_as_output() -> None:
    sequence = make_sequence(num_prompt_tokens=3, num_emitted_tokens=2, max_tokens=3)
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens) == (3, 2)
    assert sequence.append((4,)) == (1, FinishReason.LENGTH)


def test_higher_priority_goes_first_then_earlier_arrival_then_lower_choice() -> None:
    def order(priority: int, arrival: int, choice: int) -> tuple[int, int, int]:
        return Sequence(make_request("r", priority=priority), choice, arrival, frozenset(), 20).order

    expected = [order(5, 3, 0), order(0, 1, 0), order(0, 1, 1), order(0, 2, 0), order(-1, 0, 0)]
    assert sorted(reversed(expected)) == expected


def test_reset_keeps_tokens_and_forgets_what_was_computed() -> None:
    sequence = make_sequence()
    sequence.schedule(5, step=1)
    sequence.land(5, samples=True)
    sequence.append((7,))
    sequence.reset()
    assert sequence.num_remaining_tokens == 6


def test_integrity_sees_work_that_no_plan_accounts_for() -> None:
    sequence = make_sequence()
    sequence.block_ids = [0, 1]
    sequence.schedule(5, step=1)
    sequence.check_integrity(block_size=4, num_in_flight_tokens=5)
    with pytest.raises(IntegrityError):
        sequence.check_integrity(block_size=4, num_in_flight_tokens=4)
    with pytest.raises(IntegrityError):
        sequence.check_integrity(block_size=2, num_in_flight_tokens=5)
