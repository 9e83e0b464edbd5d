import pytest

from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan
from rempart_engine.testing import BookkeepingError, FakeModel, FakeRunner, fake_output, fake_token


def _new_row(row: int, token_ids: tuple[int, ...], block_ids: tuple[int, ...], choice: int = 0) -> NewRow:
    return NewRow(row, token_ids, len(token_ids), SamplingParams(seed=3), choice, block_ids)


def test_the_output_is_a_function_of_seed_choice_and_tokens() -> None:
    base = fake_token(1, 0, [5, 6], 1000)
    others = {fake_token(2, 0, [5, 6], 1000), fake_token(1, 1, [5, 6], 1000), fake_token(1, 0, [6, 5], 1000)}
    assert base == fake_token(1, 0, [5, 6], 1000)
    assert base not in others


def test_a_runner_gives_the_output_that_the_oracle_states() -> None:
    runner = FakeRunner(FakeModel(), num_blocks=2)
    first = runner.execute(StepPlan(1, (_new_row(0, (1, 2), (1,)),), (ScheduledRow(0, 0, 2, (), samples=True),)))
    second = runner.execute(StepPlan(2, (), (ScheduledRow(0, 2, 1, (), samples=True),)))
    assert [*first.rows[0].token_ids, *second.rows[0].token_ids] == fake_output([1, 2], 2, seed=3)


def test_a_block_shared_with_another_sequence_is_noticed() -> None:
    runner = FakeRunner(FakeModel(), num_blocks=1)
    runner.execute(StepPlan(1, (_new_row(0, (1, 2), (0,)),), (ScheduledRow(0, 0, 2, (), samples=True),)))
    intruder = StepPlan(2, (_new_row(1, (7, 8), (0,)),), (ScheduledRow(1, 1, 1, (), samples=True),))
    with pytest.raises(BookkeepingError, match="other tokens"):
        runner.execute(intruder)


def test_a_row_that_was_not_released_is_noticed() -> None:
    runner = FakeRunner(FakeModel(), num_blocks=1)
    plan = StepPlan(1, (_new_row(0, (1, 2), (0,)),), (ScheduledRow(0, 0, 2, (), samples=True),))
    runner.execute(plan)
    with pytest.raises(BookkeepingError, match="not released"):
        runner.execute(plan)
    runner.release_rows([0])
    assert runner.execute(plan).rows[0].token_ids == tuple(fake_output([1, 2], 1, seed=3))
