"""The loop alone, between a channel on one side and a real scheduler with a fake runner on the other."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from rempart_engine.core.request import FinishReason, Request, RequestId, SamplingParams
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.scheduler_config import SchedulerConfig
from rempart_engine.core.step import ErrorCode
from rempart_engine.engine import EngineLoop
from rempart_engine.ipc import (
    Abort,
    CoreChannel,
    FrameSplitter,
    FrontGoneError,
    FrontMessage,
    Start,
    StepUpdate,
    Stop,
    encode_frame,
    socket_pair,
)
from rempart_engine.testing import FakeModel, FakeRunner, fake_output


class Bench:
    """A loop with the test at the front's end of its channel."""

    def __init__(self, model: FakeModel, num_blocks: int = 64, sleep: Callable[[float], object] = time.sleep) -> None:
        self.front_end, self.core_end = socket_pair()
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=num_blocks,
                max_num_rows=8,
                max_step_tokens=64,
                max_model_len=512,
                max_num_waiting=8,
                vocab_size=model.vocab_size,
            )
        )
        self.runner = FakeRunner(model, num_blocks, sleep)
        self.loop = EngineLoop(self.scheduler, self.runner, CoreChannel(self.core_end), heartbeat_s=0.01)
        self._splitter = FrameSplitter()

    def send(self, *messages: FrontMessage) -> None:
        for message in messages:
            self.front_end.sendall(encode_frame(message))

    def updates(self) -> Iterator[StepUpdate]:
        while chunk := self.front_end.recv(1 << 16):
            for payload in self._splitter.feed(chunk):
                yield msgspec.msgpack.decode(payload, type=StepUpdate)

    def close(self) -> None:
        self.front_end.close()
        self.core_end.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    opened = Bench(FakeModel())
    yield opened
    opened.close()


def _request(name: str, num_tokens: int = 5, deadline: float | None = None) -> Start:
    return Start(Request(RequestId(name), (1, 2, 3), SamplingParams(max_tokens=num_tokens), deadline=deadline))


def _run_until_stopped(bench: Bench) -> list[StepUpdate]:
    bench.loop.run()
    bench.core_end.shutdown(socket.SHUT_WR)
    return list(bench.updates())


def test_a_request_runs_step_by_step_with_one_update_each(bench: Bench) -> None:
    loop = threading.Thread(target=bench.loop.run)
    loop.start()
    bench.send(_request("a"))
    tokens: list[int] = []
    num_tokens = []
    for update in bench.updates():
        tokens += [token for event in update.events for token in event.token_ids]
        num_tokens.append(update.num_tokens)
        if any(event.finish_reason for event in update.events):
            break
    bench.send(Stop())
    loop.join()
    assert tokens == fake_output([1, 2, 3], 5)
    assert [number for number in num_tokens if number] == [3, 1, 1, 1, 1]
    bench.scheduler.check_integrity()


def test_an_idle_loop_gives_signs_of_life(bench: Bench) -> None:
    loop = threading.Thread(target=bench.loop.run)
    loop.start()
    updates = bench.updates()
    assert all(next(updates).num_tokens == 0 for _ in range(3))
    bench.send(Stop())
    loop.join()


def test_rows_of_ended_requests_are_released_though_no_step_follows() -> None:
    steps = threading.Semaphore(1)
    bench = Bench(FakeModel(), sleep=lambda _: steps.acquire())
    loop = threading.Thread(target=bench.loop.run)
    loop.start()
    bench.send(_request("a", num_tokens=400))
    updates = bench.updates()
    while not next(updates).events:
        pass
    bench.send(Abort(RequestId("a")))
    steps.release()  # a second step, which had begun before
    while not any(event.finish_reason is FinishReason.ABORT for event in next(updates).events):
        pass
    bench.send(Stop())
    loop.join()
    assert bench.runner.rows == {}
    bench.close()


def test_a_deadline_that_has_passed_ends_the_request(bench: Bench) -> None:
    loop = threading.Thread(target=bench.loop.run)
    loop.start()
    bench.send(_request("late", deadline=0.0))
    event = next(event for update in bench.updates() for event in update.events)
    bench.send(Stop())
    loop.join()
    assert event.error is not None
    assert event.error.code is ErrorCode.DEADLINE_EXCEEDED


def test_stop_is_obeyed_with_work_at_hand(bench: Bench) -> None:
    bench.send(_request("a"), Stop())
    assert _run_until_stopped(bench) == []


def test_a_front_that_goes_away_ends_the_loop(bench: Bench) -> None:
    bench.send(_request("a", num_tokens=400))
    bench.front_end.close()
    with pytest.raises(FrontGoneError):
        bench.loop.run()


def test_a_step_that_raises_ends_the_loop() -> None:
    bench = Bench(FakeModel(raise_at_step=2))
    bench.send(_request("a"))
    with pytest.raises(RuntimeError, match="told to raise at step 2"):
        bench.loop.run()
    bench.close()


def test_many_requests_over_few_blocks_come_out_as_if_alone() -> None:
    bench = Bench(FakeModel(), num_blocks=6)
    loop = threading.Thread(target=bench.loop.run)
    prompts = {f"r{number}": tuple([number + 1] * 70) for number in range(6)}
    for name, prompt in prompts.items():
        bench.send(Start(Request(RequestId(name), prompt, SamplingParams(max_tokens=100))))
    loop.start()  # when all are there, so that they are in each other's way
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    unfinished = set(prompts)
    num_preemptions = 0
    for update in bench.updates():
        for event in update.events:
            outputs[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                unfinished.discard(event.request_id)
        num_preemptions = update.load.counters.num_preemptions
        if not unfinished:
            break
    bench.send(Stop())
    loop.join()
    assert outputs == {name: fake_output(prompt, 100) for name, prompt in prompts.items()}
    assert num_preemptions > 0
    bench.close()
