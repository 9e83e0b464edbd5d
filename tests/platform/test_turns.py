"""Who is woken in which pass of the event loop."""

import asyncio

from rempart_platform.endpoints.turns import Turns


def _sleepers(number: int) -> list[asyncio.Future[None]]:
    return [asyncio.get_running_loop().create_future() for _ in range(number)]


def _num_woken(sleepers: list[asyncio.Future[None]]) -> int:
    return sum(sleeper.done() for sleeper in sleepers)


async def test_all_are_woken_at_once_while_there_are_few() -> None:
    turns, sleepers = Turns(4), _sleepers(4)
    for sleeper in sleepers:
        turns.ask(sleeper)
    assert _num_woken(sleepers) == 4


async def test_many_are_woken_in_order_in_passes_that_follow() -> None:
    turns, sleepers = Turns(4), _sleepers(10)
    for sleeper in sleepers:
        turns.ask(sleeper)
    woken = [_num_woken(sleepers)]
    while woken[-1] < 10:
        await asyncio.sleep(0)
        woken.append(_num_woken(sleepers))
        assert all(sleeper.done() for sleeper in sleepers[: woken[-1]])
    assert [count for count in woken if count in (4, 8, 10)] == woken


async def test_one_that_comes_in_the_middle_of_a_full_pass_waits_behind_the_others() -> None:
    turns, first, late = Turns(2), _sleepers(4), _sleepers(1)
    for sleeper in (*first, *late):
        turns.ask(sleeper)
    await asyncio.sleep(0)
    assert (_num_woken(first), _num_woken(late)) == (4, 0)
    await asyncio.wait_for(late[0], 5)


async def test_a_stream_that_was_left_takes_no_turn() -> None:
    turns, sleepers = Turns(1), _sleepers(3)
    for sleeper in sleepers:
        turns.ask(sleeper)
    sleepers[1].cancel()
    await asyncio.sleep(0)
    assert sleepers[2].done()


async def test_after_a_rest_there_is_a_whole_pass_again() -> None:
    turns = Turns(2)
    for _ in range(3):
        sleepers = _sleepers(2)
        for sleeper in sleepers:
            turns.ask(sleeper)
        assert _num_woken(sleepers) == 2
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_of_very_many_more_are_woken_in_a_pass_so_that_none_waits_for_long() -> None:
    turns, sleepers = Turns(1), _sleepers(1000)
    for sleeper in sleepers:
        turns.ask(sleeper)
    await asyncio.sleep(0)
    assert _num_woken(sleepers) == 1 + 999 // 64
