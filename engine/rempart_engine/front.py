"""The engine front's book of requests: who asked for what, and who hears what a step brought.

    caller's stream -> start / abort -> engine core -> on_step -> the session of each event -> caller's stream

One owner, one thread (the event loop); no method waits, except `drain`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

import grpc

from rempart_engine.config import EngineConfig
from rempart_engine.core.load import Load
from rempart_engine.core.request import FinishReason, InvalidRequestError, RequestId
from rempart_engine.core.step import ErrorCode, EventError, TokenEvent
from rempart_engine.ipc import Abort, FrontMessage, Ready, Start, StepUpdate
from rempart_engine.metrics import EngineMetrics
from rempart_engine.open_request import OpenRequest
from rempart_engine.proto_codec import (
    event_to_proto,
    load_to_proto,
    num_choices,
    request_from_proto,
)
from rempart_engine.session import CallerSession
from rempart_protos.v1 import engine_pb2

_log = logging.getLogger(__name__)

GENERATE_NAMESPACE = "generate"
"""All Generate calls share one space of ids, in which Abort finds them; every session has its own."""

_WHOLE_REQUEST = frozenset({ErrorCode.INVALID_ARGUMENT, ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE})
"""Errors that end all choices of a request, not one."""


class Phase(Enum):
    """What the engine does with new requests; the value is what a refused caller reads."""

    LOADING = "engine is loading its model"
    SERVING = "engine is serving"
    DRAINING = "engine is draining"
    LOST = "engine core is lost"


class EngineFront:
    """Requests and sessions of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        send: Callable[[FrontMessage], None],
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase = Phase.LOADING
        self.model: Ready | None = None
        self._config = config
        self._send = send
        self._metrics = metrics
        self._clock = clock
        self._load: Load | None = None
        self._requests: dict[RequestId, OpenRequest] = {}
        self._sessions: dict[CallerSession, set[RequestId]] = {}
        self._num_sessions = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @contextmanager
    def session(self, namespace: str | None = None) -> Iterator[CallerSession]:
        """A stream's outbound side; leaving the block aborts what still runs on it."""
        self._num_sessions += 1
        session = CallerSession(namespace or f"session-{self._num_sessions}", self._config.max_session_buffer_bytes)
        self._sessions[session] = set()
        if (load := self.load()) is not None:
            session.push_load(load)
        try:
            yield session
        finally:
            for core_id in list(self._sessions[session]):
                self._detach(session, self._requests[core_id])
            del self._sessions[session]

    def start(self, session: CallerSession, message: engine_pb2.GenerateRequest) -> None:
        """Hand a request to the core, or answer it with an error; other requests are not touched either way."""
        core_id = _core_id(session.namespace, message.request_id)
        refusal = self._refusal(core_id)
        if refusal is not None:
            self._refuse(session, message, refusal)
            return
        now = self._clock()
        try:
            request = request_from_proto(message, core_id, self._config, now)
        except InvalidRequestError as error:
            self._refuse(session, message, EventError(ErrorCode.INVALID_ARGUMENT, str(error)))
            return
        self._requests[core_id] = OpenRequest(request, message.request_id, session, now)
        self._sessions[session].add(core_id)
        self._is_idle.clear()
        self._send(Start(request))

    def abort(self, namespace: str, caller_id: str) -> bool:
        """Have the core end a request; its events say when. False when none of this id runs."""
        request = self._requests.get(_core_id(namespace, caller_id))
        if request is None or request.session is None:
            return False
        self._send(Abort(request.core_id))
        return True

    def close_when_idle(self, session: CallerSession) -> None:
        """No more requests will come on this session: end it after the last event of those it has."""
        session.takes_requests = False
        self._end_if_idle(session)

    def load(self) -> engine_pb2.EngineLoad | None:
        """The last load that the core told; None while loading."""
        if self._load is None:
            return None
        return load_to_proto(self._load, draining=self.phase in (Phase.DRAINING, Phase.LOST))

    def push_load(self) -> None:
        """Send the load to every session, whether or not a step concerned it."""
        if (load := self.load()) is not None:
            for session in self._sessions:
                session.push_load(load)

    def on_ready(self, model: Ready) -> None:
        """The core has loaded the model."""
        self.model = model
        self._metrics.set_model(model)
        if self.phase is Phase.LOADING:
            self.phase = Phase.SERVING

    def on_step(self, update: StepUpdate) -> None:
        """Bring every event to its session; one update with the load for each session that has any."""
        self._load = update.load
        self._metrics.observe_step(update)
        concerned = set()
        for event in update.events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue  # already told its end
            if request.session is not None:
                concerned.add(request.session)
            if event.error is not None and event.error.code in _WHOLE_REQUEST:
                self._fail(request, FinishReason.ERROR, event.error)
            else:
                self._deliver(request, event)
            self._forget_if_over(request)
        if concerned and (load := self.load()) is not None:
            for session in concerned:
                session.push_load(load)

    def on_core_lost(self, reason: str) -> None:
        """Tell every request and session that the core is gone; nothing is taken from now on."""
        self.phase = Phase.LOST
        error = EventError(ErrorCode.UNAVAILABLE, reason)
        for request in list(self._requests.values()):
            self._fail(request, FinishReason.ERROR, error)
            self._forget_if_over(request)
        self.end_sessions(reason)

    def end_sessions(self, reason: str) -> None:
        """End every stream with UNAVAILABLE, after what is queued for it."""
        for session in self._sessions:
            session.end(grpc.StatusCode.UNAVAILABLE, reason)

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new, wait for what runs, abort the rest; the number of requests aborted."""
        if self.phase is not Phase.LOST:
            self.phase = Phase.DRAINING
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        else:
            return 0
        heard = [request for request in self._requests.values() if request.session is not None]
        error = EventError(ErrorCode.UNAVAILABLE, f"{Phase.DRAINING.value}; {timeout_s:g} s are over")
        for request in heard:
            assert request.session is not None
            for event in request.last_events(FinishReason.ABORT, error):
                request.session.push(event_to_proto(event, request.caller_id))
            self._detach(request.session, request)
        await self._is_idle.wait()
        return len(heard)

    def _refusal(self, core_id: RequestId) -> EventError | None:
        if self.phase is not Phase.SERVING:
            return EventError(ErrorCode.UNAVAILABLE, self.phase.value)
        if core_id in self._requests:
            return EventError(ErrorCode.INVALID_ARGUMENT, "a request with this request_id is running")
        most = self._config.max_num_waiting + self._config.max_num_rows
        if len(self._requests) >= most:  # also bounds what is sent to a core that does not read
            return EventError(
                ErrorCode.RESOURCE_EXHAUSTED, f"max_num_waiting + max_num_rows = {most} requests are open"
            )
        return None

    def _refuse(self, session: CallerSession, message: engine_pb2.GenerateRequest, error: EventError) -> None:
        for choice in range(num_choices(message, self._config.max_n)):
            event = TokenEvent(
                RequestId(message.request_id),
                choice,
                message.num_emitted_tokens,
                (),
                (),
                FinishReason.ERROR,
                error=error,
            )
            session.push(event_to_proto(event, message.request_id))
            self._metrics.observe_choice_end(FinishReason.ERROR)
        self._end_if_idle(session)

    def _deliver(self, request: OpenRequest, event: TokenEvent) -> None:
        if event.token_ids and request.first_token_at is None:
            request.first_token_at = self._clock()
            self._metrics.observe_first_token(request.first_token_at - request.received_at, request.num_prompt_tokens)
        if event.finish_reason is not None:
            self._metrics.observe_choice_end(event.finish_reason)
        request.follow(event)
        if request.session is not None:
            request.session.push(event_to_proto(event, request.caller_id))

    def _detach(self, session: CallerSession, request: OpenRequest) -> None:
        """Abort a request that nobody listens to any more; it stays in the book until the core confirms."""
        self._sessions[session].discard(request.core_id)
        request.session = None
        self._send(Abort(request.core_id))

    def _fail(self, request: OpenRequest, reason: FinishReason, error: EventError) -> None:
        """End all choices of a request that the core will say nothing more about."""
        for event in list(request.last_events(reason, error)):
            self._deliver(request, event)

    def _forget_if_over(self, request: OpenRequest) -> None:
        if not request.is_over:
            return
        del self._requests[request.core_id]
        seconds = self._clock() - request.received_at
        self._metrics.observe_request_end(seconds)
        _log.info("request ended", extra=request.summary() | {"seconds": round(seconds, 6)})
        if (session := request.session) is not None:
            self._sessions[session].discard(request.core_id)
            self._end_if_idle(session)
        if not self._requests:
            self._is_idle.set()

    def _end_if_idle(self, session: CallerSession) -> None:
        if not session.takes_requests and not self._sessions[session]:
            session.end(grpc.StatusCode.OK)


def _core_id(namespace: str, caller_id: str) -> RequestId:
    return RequestId(f"{namespace}/{caller_id}")
