import asyncio

import pytest

from rempart_platform.endpoints.token_stream import TokenStream
from rempart_platform.endpoints.turns import Turns
from rempart_platform.errors import ErrorKind, RempartError
from rempart_protos.v1 import engine_pb2, sampling_pb2

STOP = sampling_pb2.FINISH_REASON_STOP


class Stream:
    """A token stream with a record of what it told its connection."""

    def __init__(self, num_choices: int = 1, num_emitted_tokens: int = 0, max_buffered_tokens: int = 8) -> None:
        request = engine_pb2.GenerateRequest(
            request_id="r",
            sampling=sampling_pb2.SamplingParams(n=num_choices),
            num_emitted_tokens=num_emitted_tokens,
        )
        self.ends: list[bool] = []
        self.stream = TokenStream(request, max_buffered_tokens, self.ends.append, Turns(16))

    def push(
        self,
        index: int,
        *token_ids: int,
        choice: int = 0,
        finish: sampling_pb2.FinishReason = sampling_pb2.FINISH_REASON_UNSPECIFIED,
        code: engine_pb2.EngineError.Code | None = None,
    ) -> None:
        event = engine_pb2.TokenEvent(choice=choice, index=index, token_ids=token_ids, finish_reason=finish)
        if code is not None:
            event.error.code = code
            event.error.message = "max_tokens must be below 7"
        self.stream.push(event)

    async def read(self) -> list[int]:
        return [token_id for event in await anext(self.stream) for token_id in event.token_ids]


async def test_events_that_came_together_are_handed_over_together() -> None:
    stream = Stream()
    stream.push(0, 10)
    stream.push(1, 11, 12)
    assert await stream.read() == [10, 11, 12]
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    stream.push(3, 13, finish=STOP)
    assert await reading == [13]
    with pytest.raises(StopAsyncIteration):
        await anext(stream.stream)
    assert stream.ends == [False]


async def test_a_stream_goes_on_at_the_index_after_the_emitted_tokens() -> None:
    stream = Stream(num_emitted_tokens=5)
    stream.push(5, 10)
    assert await stream.read() == [10]


@pytest.mark.parametrize(("index", "choice"), [(0, 0), (2, 0), (7, 0), (0, 1)])
async def test_a_gap_a_repeat_or_a_foreign_choice_fails_the_request_and_is_not_delivered(
    index: int, choice: int
) -> None:
    stream = Stream()
    stream.push(0, 10)
    stream.push(index, 99, choice=choice)
    stream.push(1, 11)
    assert await stream.read() == [10]
    with pytest.raises(RempartError) as caught:
        await anext(stream.stream)
    assert caught.value.kind is ErrorKind.INTERNAL
    assert stream.ends == [True]


async def test_tokens_after_the_end_of_a_choice_fail_the_request() -> None:
    stream = Stream(num_choices=2)
    stream.push(0, 10, finish=STOP)
    stream.push(1, 11)
    assert await stream.read() == [10]
    with pytest.raises(RempartError) as caught:
        await anext(stream.stream)
    assert caught.value.kind is ErrorKind.INTERNAL


async def test_the_stream_ends_when_every_choice_has() -> None:
    stream = Stream(num_choices=2)
    stream.push(0, 10, finish=STOP)
    assert stream.ends == []
    stream.push(0, choice=1, finish=STOP)
    assert stream.ends == [False]
    assert await stream.read() == [10]
    with pytest.raises(StopAsyncIteration):
        await anext(stream.stream)


@pytest.mark.parametrize(
    ("code", "kind", "has_wait"),
    [
        (engine_pb2.EngineError.CODE_INVALID_ARGUMENT, ErrorKind.INVALID_REQUEST, False),
        (engine_pb2.EngineError.CODE_RESOURCE_EXHAUSTED, ErrorKind.UNAVAILABLE, True),
        (engine_pb2.EngineError.CODE_UNAVAILABLE, ErrorKind.UNAVAILABLE, True),
        (engine_pb2.EngineError.CODE_DEADLINE_EXCEEDED, ErrorKind.DEADLINE_EXCEEDED, False),
        (engine_pb2.EngineError.CODE_INTERNAL, ErrorKind.INTERNAL, False),
        (engine_pb2.EngineError.CODE_CANCELLED, ErrorKind.INTERNAL, False),
        (engine_pb2.EngineError.CODE_UNSPECIFIED, ErrorKind.INTERNAL, False),
    ],
)
async def test_every_engine_error_has_its_answer(
    code: engine_pb2.EngineError.Code, kind: ErrorKind, has_wait: bool
) -> None:
    stream = Stream()
    stream.push(0, finish=sampling_pb2.FINISH_REASON_ERROR, code=code)
    with pytest.raises(RempartError) as caught:
        await anext(stream.stream)
    assert caught.value.kind is kind
    assert (caught.value.retry_after_s is not None) is has_wait
    assert ("below 7" in caught.value.message) is (kind is ErrorKind.INVALID_REQUEST)
    assert stream.ends == [False]


async def test_a_consumer_that_is_too_slow_loses_its_buffer_and_learns_why() -> None:
    stream = Stream(max_buffered_tokens=8)
    for index in range(9):
        stream.push(index, 10)
    assert stream.ends == [True]
    with pytest.raises(RempartError, match="reads too slowly: more than 8 tokens") as caught:
        await anext(stream.stream)
    assert caught.value.kind is ErrorKind.REQUEST_TIMEOUT


async def test_a_consumer_that_keeps_up_may_read_any_number_of_tokens() -> None:
    stream = Stream(max_buffered_tokens=8)
    for index in range(0, 800, 8):
        stream.push(index, *range(8))
        assert len(await stream.read()) == 8
    assert stream.ends == []


async def test_leaving_before_the_end_tells_that_the_engine_still_runs_it() -> None:
    stream = Stream()
    with stream.stream:
        stream.push(0, 10)
    stream.push(1, 11)
    stream.stream.close()
    assert stream.ends == [True]


async def test_a_failure_from_outside_comes_after_what_was_in_order() -> None:
    stream = Stream()
    stream.push(0, 10)
    stream.stream.fail(RempartError(ErrorKind.UNAVAILABLE, "lost"), still_runs=False)
    assert await stream.read() == [10]
    with pytest.raises(RempartError, match="lost"):
        await anext(stream.stream)
    assert stream.ends == [False]


async def test_tokens_that_nobody_reads_yet_are_gathered_until_the_end() -> None:
    stream = Stream()
    stream.stream.gather(3600.0)
    stream.push(0, 10)
    assert await stream.read() == [10]
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    stream.push(1, 11)
    stream.push(2, 12)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reading.done()
    stream.push(3, 13, finish=STOP)
    assert await reading == [11, 12, 13]


async def test_no_more_is_gathered_than_half_of_what_may_be_buffered() -> None:
    stream = Stream(max_buffered_tokens=8)
    stream.stream.gather(3600.0)
    stream.push(0, 10)
    assert await stream.read() == [10]
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    for index in range(1, 6):
        stream.push(index, 10 + index)
    assert await reading == [11, 12, 13, 14, 15]


async def test_a_failure_does_not_wait_for_what_is_gathered() -> None:
    stream = Stream()
    stream.stream.gather(3600.0)
    stream.push(0, 10)
    assert await stream.read() == [10]
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    stream.push(1, 11)
    stream.stream.fail(RempartError(ErrorKind.UNAVAILABLE, "lost"), still_runs=False)
    assert await reading == [11]
    with pytest.raises(RempartError):
        await anext(stream.stream)
