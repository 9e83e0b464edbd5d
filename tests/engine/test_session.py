import asyncio
import itertools

import grpc
import pytest

from rempart_engine.session import CallerSession
from rempart_protos.v1 import engine_pb2


def _event(index: int, num_tokens: int = 1) -> engine_pb2.TokenEvent:
    return engine_pb2.TokenEvent(request_id="r", index=index, token_ids=[7] * num_tokens)


async def _all_updates(session: CallerSession) -> list[engine_pb2.SessionUpdate]:
    return [update async for update in session.updates()]


async def test_events_pushed_together_come_as_one_update_with_the_load() -> None:
    session = CallerSession("s", 1 << 20)
    session.push(_event(0))
    session.push(_event(1))
    session.push_load(engine_pb2.EngineLoad(num_running=1))
    session.end(grpc.StatusCode.OK)
    (update,) = await _all_updates(session)
    assert [event.index for event in update.events] == [0, 1]
    assert update.load.num_running == 1


async def test_only_the_latest_load_waits() -> None:
    session = CallerSession("s", 1 << 20)
    for number in range(100):
        session.push_load(engine_pb2.EngineLoad(num_running=number))
    session.end(grpc.StatusCode.OK)
    assert [update.load.num_running for update in await _all_updates(session)] == [99]


async def test_updates_wait_for_events() -> None:
    session = CallerSession("s", 1 << 20)
    taking = asyncio.create_task(_all_updates(session))
    await asyncio.sleep(0)
    assert not taking.done()
    session.push(_event(0))
    session.end(grpc.StatusCode.OK)
    assert [event.index for update in await taking for event in update.events] == [0]


async def test_a_large_backlog_is_cut_into_messages_that_grpc_takes() -> None:
    session = CallerSession("s", 64 << 20)
    for index in range(20):
        session.push(_event(index, num_tokens=200_000))
    session.end(grpc.StatusCode.OK)
    updates = await _all_updates(session)
    assert [event.index for update in updates for event in update.events] == list(range(20))
    assert all(update.ByteSize() < 4 << 20 for update in updates)


async def test_a_full_buffer_ends_the_session_and_names_the_limit() -> None:
    session = CallerSession("s", 100)
    for index in itertools.count():
        session.push(_event(index))
        if session.dropped.is_set():
            break
        assert index < 100
    assert session.ending is not None
    assert session.ending.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_session_buffer_bytes = 100" in session.ending.message
    assert await _all_updates(session) == []


async def test_taking_events_makes_room_for_more() -> None:
    session = CallerSession("s", 100)
    updates = session.updates()
    for index in range(1000):
        session.push(_event(index))
        assert [event.index for event in (await anext(updates)).events] == [index]
    assert session.ending is None


@pytest.mark.parametrize("instead", [False, True])
async def test_the_first_ending_counts_unless_another_shall_stand_instead(instead: bool) -> None:
    session = CallerSession("s", 100)
    session.end(grpc.StatusCode.OK)
    session.end(grpc.StatusCode.UNAVAILABLE, "gone", instead=instead)
    assert session.ending is not None
    assert (session.ending.code is grpc.StatusCode.UNAVAILABLE) is instead
