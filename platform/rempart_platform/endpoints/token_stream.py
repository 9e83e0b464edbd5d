"""The token events of one request, between the session's reader, which never waits, and one consumer, which may.

    reader ── push(event) ──► [ bounded buffer ] ── async for events ──► consumer
              checks that indices have neither gap nor repeat            close(): abort what still runs

A consumer that lets the buffer fill loses its own request and disturbs no other.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType

from rempart_platform.endpoints.turns import Turns
from rempart_platform.errors import ErrorKind, RempartError
from rempart_protos.v1 import engine_pb2, sampling_pb2

_RETRY_AFTER_S = 1.0

_ERROR_KINDS = {
    engine_pb2.EngineError.CODE_INVALID_ARGUMENT: ErrorKind.INVALID_REQUEST,
    engine_pb2.EngineError.CODE_RESOURCE_EXHAUSTED: ErrorKind.UNAVAILABLE,
    engine_pb2.EngineError.CODE_UNAVAILABLE: ErrorKind.UNAVAILABLE,
    engine_pb2.EngineError.CODE_DEADLINE_EXCEEDED: ErrorKind.DEADLINE_EXCEEDED,
}
_MESSAGES = {
    ErrorKind.UNAVAILABLE: "The model has no free capacity at the moment. Try again.",
    ErrorKind.DEADLINE_EXCEEDED: "The request ran out of time.",
    ErrorKind.INTERNAL: "The model could not finish this request.",
}


def error_of(event: engine_pb2.TokenEvent) -> RempartError:
    """The answer for an event that ends a choice by FINISH_REASON_ABORT or FINISH_REASON_ERROR."""
    kind = _ERROR_KINDS.get(event.error.code, ErrorKind.INTERNAL)
    message = event.error.message if kind is ErrorKind.INVALID_REQUEST else _MESSAGES[kind]
    return RempartError(kind, message, retry_after_s=_RETRY_AFTER_S if kind is ErrorKind.UNAVAILABLE else None)


class TokenStream:
    """Asynchronous iterator over lists of token events: each list is all that has come since the last one.

    It ends when every choice has finished. It raises RempartError when the engine fails the request, is lost, or
    breaks the order of tokens, and when the consumer was too slow; events that came in order before are delivered
    first, except to a consumer that was too slow. Leave it as a context manager, or call `close`: what still runs on
    the engine then is aborted.

    Args:
        request: what was asked of the engine.
        max_buffered_tokens: the most tokens that may wait for the consumer.
        on_end: told once, when no more events are wanted: whether the engine still runs the request.
        turns: when the consumer is woken.
    """

    def __init__(
        self,
        request: engine_pb2.GenerateRequest,
        max_buffered_tokens: int,
        on_end: Callable[[bool], None],
        turns: Turns,
    ) -> None:
        num_choices = request.sampling.n if request.sampling.HasField("n") else 1
        self._next_index: list[int | None] = [request.num_emitted_tokens] * num_choices  # None: the choice has ended
        self._num_live = num_choices
        self._max_buffered_tokens = max_buffered_tokens
        self._on_end = on_end
        self._turns = turns
        self._is_ended = False
        self._events: list[engine_pb2.TokenEvent] = []
        self._num_buffered_tokens = 0
        self._error: RempartError | None = None
        self._waiter: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()  # asked once: each time is a system call
        self._new_waiter = loop.create_future
        self._clock = loop.time
        self._gather_s = 0.0
        self._gathers_until = 0.0

    def gather(self, gather_s: float) -> None:
        """From the second time on, wakes the consumer no sooner than this after the last, unless something ends.

        Tokens wake it, and not the time, so what an engine sent before it stalls is taken when it goes on or ends. No
        more is gathered than half of what may be buffered.
        """
        self._gather_s = gather_s

    def push(self, event: engine_pb2.TokenEvent) -> None:
        """Takes the next event from the engine. Never waits."""
        if self._is_ended:
            return
        num_tokens = len(event.token_ids)
        choice = event.choice
        if not self._is_in_order(choice, event.index, num_tokens):
            self.fail(RempartError(ErrorKind.INTERNAL, "The model broke the order of tokens."), still_runs=True)
            return
        finish_reason = event.finish_reason
        if finish_reason in (sampling_pb2.FINISH_REASON_ABORT, sampling_pb2.FINISH_REASON_ERROR):
            self.fail(error_of(event), still_runs=self._num_live > 1)
            return
        self._events.append(event)
        self._num_buffered_tokens += num_tokens
        if finish_reason:
            self._finish_choice(choice)
        else:
            self._next_index[choice] = event.index + num_tokens
        if self._num_buffered_tokens > self._max_buffered_tokens:
            self._drop_slow_consumer()
        if finish_reason or not self._is_gathering():
            self._wake()

    def fail(self, error: RempartError, *, still_runs: bool) -> None:
        """Ends the stream with an error, behind the events that are already in the buffer."""
        if self._is_ended:
            return
        self._error = error
        self._end(still_runs=still_runs)
        self._wake()

    def close(self) -> None:
        """Ends the stream for its consumer. What still runs on the engine is aborted. Safe to repeat."""
        self._events = []
        if not self._is_ended:
            self._end(still_runs=True)

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> list[engine_pb2.TokenEvent]:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            waiter = self._waiter = self._new_waiter()
            await waiter
        events, self._events = self._events, []
        self._num_buffered_tokens = 0
        if self._gather_s:
            self._gathers_until = self._clock() + self._gather_s
        return events

    def _is_gathering(self) -> bool:
        is_half_full = 2 * self._num_buffered_tokens > self._max_buffered_tokens
        return not is_half_full and self._clock() < self._gathers_until

    def _is_in_order(self, choice: int, index: int, num_tokens: int) -> bool:
        if choice >= len(self._next_index):
            return False
        expected = self._next_index[choice]
        return expected is not None and (index == expected or num_tokens == 0)

    def _finish_choice(self, choice: int) -> None:
        self._next_index[choice] = None
        self._num_live -= 1
        if self._num_live == 0:
            self._end(still_runs=False)

    def _drop_slow_consumer(self) -> None:
        self._events = []
        self._error = RempartError(
            ErrorKind.REQUEST_TIMEOUT,
            f"The client reads too slowly: more than {self._max_buffered_tokens} tokens were waiting for it.",
        )
        if not self._is_ended:
            self._end(still_runs=True)

    def _end(self, *, still_runs: bool) -> None:
        self._is_ended = True
        self._on_end(still_runs)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._turns.ask(waiter)
