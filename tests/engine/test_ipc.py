import asyncio
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_engine.config import EngineConfig
from rempart_engine.core.load import Counters, Load
from rempart_engine.core.request import FinishReason, Request, RequestId, SamplingParams
from rempart_engine.core.step import ErrorCode, EventError, TokenEvent, TokenLogprob
from rempart_engine.ipc import (
    Abort,
    Configure,
    CoreChannel,
    CoreMessage,
    FrameSplitter,
    FrontChannel,
    FrontGoneError,
    FrontMessage,
    LoadFailed,
    Loading,
    Ready,
    Start,
    StepUpdate,
    Stop,
    encode_frame,
    socket_pair,
)

_COUNTERS = Counters(1, 2, 3, 4, 5, 6, 7, dict.fromkeys(FinishReason, 8))
_LOAD = Load(1, 2, 3, 4, 5, 6, _COUNTERS)

FRONT_MESSAGES: list[FrontMessage] = [
    Configure(EngineConfig(model=Path("/m/x.gguf"), max_model_len=100)),
    Start(Request(RequestId("session-1/a"), (1, 2, 3), SamplingParams())),
    Start(
        Request(
            RequestId("é"),
            (7,),
            SamplingParams(logit_bias={5: -1.5}, seed=2**64 - 1, n=2, logprobs=0, stop_token_ids=(1, 2)),
            priority=-3,
            deadline=12.5,
            cache_salt=b"\x00\xff",
            num_emitted_tokens=1,
        )
    ),
    Abort(RequestId("session-1/a")),
    Stop(),
]
CORE_MESSAGES: list[CoreMessage] = [
    Loading(0.25),
    LoadFailed("no such file"),
    Ready("m", "llama", 1000, 2048, (0, 2), 64, "float32"),
    StepUpdate(
        events=(
            TokenEvent(RequestId("a"), 0, 3, (5,), (TokenLogprob(-0.5, (5, 6), (-0.5, -1.0)),), FinishReason.STOP, 64),
            TokenEvent(RequestId("b"), 1, 0, error=EventError(ErrorCode.INTERNAL, "nan")),
        ),
        load=_LOAD,
        num_tokens=4,
        duration_s=0.01,
    ),
]


@given(payloads=st.lists(st.binary(max_size=40), max_size=8), cut=st.integers(1, 9))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(payloads: list[bytes], cut: int) -> None:
    stream = b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)
    splitter = FrameSplitter()
    chunks = [stream[at : at + cut] for at in range(0, len(stream), cut)]
    assert [payload for chunk in chunks for payload in splitter.feed(chunk)] == payloads


async def test_messages_arrive_equal_in_both_directions() -> None:
    front_end, core_end = socket_pair()
    channel = await FrontChannel.open(front_end)
    with core_end:
        core = CoreChannel(core_end)
        for message in FRONT_MESSAGES:
            channel.send(message)
        await asyncio.sleep(0)
        assert core.receive(timeout_s=5) == FRONT_MESSAGES
        for reply in CORE_MESSAGES:
            core.send(reply)
    assert [message async for message in channel.messages()] == CORE_MESSAGES
    channel.close()


def test_the_core_does_not_wait_when_told_not_to() -> None:
    front_end, core_end = socket_pair()
    with front_end, core_end:
        assert CoreChannel(core_end).receive(timeout_s=0) == []


def test_the_core_notices_that_the_front_is_gone() -> None:
    front_end, core_end = socket_pair()
    with core_end:
        core = CoreChannel(core_end)
        front_end.close()
        with pytest.raises(FrontGoneError):
            core.receive(timeout_s=None)
        with pytest.raises(FrontGoneError):
            core.send(Loading(0.0))


async def test_a_message_larger_than_any_socket_buffer_passes() -> None:
    front_end, core_end = socket_pair()
    channel = await FrontChannel.open(front_end)
    update = LoadFailed("x" * (8 << 20))
    with core_end:
        sender = threading.Thread(target=CoreChannel(core_end).send, args=(update,))
        sender.start()
        assert await anext(channel.messages()) == update
        sender.join()
    channel.close()


def test_a_frame_states_its_length() -> None:
    frame = encode_frame(Stop())
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
