"""All endpoints of a router: one session each, what it remembers of them, and the choice among them."""

import asyncio
import functools
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Never

from rempart_platform.breaker import Breaker
from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.pick import PickConfig, PickRequest, can_take, pick, serves
from rempart_platform.endpoints.prefix_index import BLOCK_TOKENS, PrefixIndex, prefix_hashes
from rempart_platform.endpoints.session import EngineSession, SessionConfig
from rempart_platform.endpoints.source import EndpointSet, EndpointSource
from rempart_platform.endpoints.token_stream import TokenStream
from rempart_platform.errors import ErrorKind, RempartError
from rempart_protos.v1 import engine_pb2

_DEFAULT_PICKING = PickConfig()


def no_endpoint(model: str, retry_after_s: float) -> RempartError:
    """The answer when nothing can take a request for the model."""
    return RempartError(
        ErrorKind.UNAVAILABLE, f"No engine is ready to serve {model!r}. Try again.", retry_after_s=retry_after_s
    )


class Attempt:
    """A request at the endpoint that was picked for it.

    Args:
        session: the endpoint's.
        expected_cached_tokens: of its prompt, as the pick expected.
        breaker: the endpoint's.
    """

    def __init__(self, session: EngineSession, expected_cached_tokens: int, breaker: Breaker) -> None:
        self.expected_cached_tokens = expected_cached_tokens
        self._session = session
        self._breaker = breaker
        self._has_begun = False

    @property
    def address(self) -> str:
        return self._session.address

    def generate(self, request: engine_pb2.GenerateRequest) -> TokenStream:
        """As `EngineSession.generate`."""
        return self._session.generate(request)

    def began(self) -> None:
        """To be called at the engine's first event: the endpoint works."""
        self._has_begun = True
        self._breaker.record_success()

    def failed(self, error: RempartError) -> None:
        """Counts an end by an error. What an engine had begun and then lost is told by its session."""
        if error.kind is ErrorKind.UNAVAILABLE and not self._has_begun:
            self._breaker.record_failure()


@dataclass(slots=True)
class _Member:
    """An endpoint of the pool."""

    session: EngineSession
    breaker: Breaker
    running: asyncio.Task[Never]
    is_leaving: bool = False
    """It gets no new requests: it is terminating, or gone."""
    is_gone: bool = False
    """Its session closes with its last request."""

    @property
    def state(self) -> EndpointState:
        """The session's, with what only the pool knows."""
        is_left_out = self.breaker.refuses
        if not (is_left_out or self.is_leaving):
            return self.session.state
        return replace(self.session.state, is_left_out=is_left_out, is_leaving=self.is_leaving)


class EnginePool:
    """The sessions of the endpoints that a source tells.

    Args:
        source: where engines are.
        config: for every session.
        rng: spreads requests over equal endpoints and jitters reconnects.
        on_change: told when an endpoint becomes ready, starts to drain, or is lost.
        on_sync: told whenever the source has told its set.
        picking: what is remembered and expected of endpoints.
        retry_after_s: wait that is advised while no endpoint is ready.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        source: EndpointSource,
        config: SessionConfig,
        rng: random.Random,
        on_change: Callable[[EndpointState], None] = lambda state: None,
        *,
        on_sync: Callable[[], None] = lambda: None,
        picking: PickConfig = _DEFAULT_PICKING,
        retry_after_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._config = config
        self._rng = rng
        self._on_change = on_change
        self._on_sync = on_sync
        self._picking = picking
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._connecting = asyncio.Semaphore(config.max_connecting)
        self._prefixes = PrefixIndex(picking.max_prefixes)

    @property
    def has_synced(self) -> bool:
        """Whether the source knew the endpoints once, even that there are none."""
        return self._source.has_synced

    async def run(self) -> None:
        """Follows the source and keeps all sessions up until cancelled."""
        async with asyncio.TaskGroup() as sessions:
            await self._source.run(functools.partial(self._take_set, sessions))

    def states(self) -> tuple[EndpointState, ...]:
        """All endpoints at this moment. May be called from any thread."""
        return tuple(self._each_state())

    def is_served(self, model: str) -> bool:
        """Whether some endpoint is ready for the model, be it left out for a while."""
        return any(serves(state, model) for state in self._each_state())

    def can_serve(self, model: str, avoid: Collection[str] = ()) -> bool:
        """Whether some endpoint other than those to avoid can take a request for the model now."""
        return any(can_take(state, model) and state.address not in avoid for state in self._each_state())

    def _each_state(self) -> Iterator[EndpointState]:
        return (member.state for member in tuple(self._members.values()))

    @contextmanager
    def pick(self, request: PickRequest, avoid: Collection[str] = ()) -> Iterator[Attempt]:
        """An endpoint for the request, in flight there until the block is left.

        Raises:
            RempartError: UNAVAILABLE with the advised wait, when no endpoint can take it.
        """
        hashes = self._hashes(request)
        cached = {address: self._cached_tokens(address, request, hashes) for address in self._members}
        state = pick(self.states(), request.model, self._rng, avoid=avoid, cached_tokens=cached)
        if state is None:
            raise no_endpoint(request.model, self._retry_after_s)
        assert state.model is not None  # or it could not take any
        address = state.address
        room = state.load.num_blocks * state.model.block_size // BLOCK_TOKENS
        self._prefixes.remember(address, hashes, room)
        member = self._members[address]
        member.breaker.wait_s()  # where it is open this request is the probe, and no other passes
        attempt = Attempt(member.session, cached[address], member.breaker)
        try:
            with member.session.in_flight(self._work_tokens(request, cached[address])):
                yield attempt
        except RempartError as error:
            attempt.failed(error)
            raise
        finally:
            self._close_if_over(member)

    def _hashes(self, request: PickRequest) -> tuple[int, ...]:
        if self._picking.max_prefixes == 0:
            return ()
        return prefix_hashes(request.cache_salt, request.prompt_token_ids)

    def _cached_tokens(self, address: str, request: PickRequest, hashes: Sequence[int]) -> int:
        # The last token is always computed, for its logits, so a block that ends with it is too.
        usable = hashes[: max(len(request.prompt_token_ids) - 1, 0) // BLOCK_TOKENS]
        return self._prefixes.num_cached_blocks(address, usable) * BLOCK_TOKENS

    def _work_tokens(self, request: PickRequest, cached_tokens: int) -> int:
        output_tokens = min(request.max_output_tokens, self._picking.max_counted_output_tokens)
        return len(request.prompt_token_ids) - cached_tokens + request.num_choices * output_tokens

    def _take_set(self, sessions: asyncio.TaskGroup, told: EndpointSet) -> None:
        for address in sorted(told.serving - self._members.keys()):
            self._members[address] = self._open(sessions, address)
        for address, member in tuple(self._members.items()):
            was_leaving, member.is_leaving = member.is_leaving, address not in told.serving
            member.is_gone = member.is_leaving and address not in told.terminating
            if member.is_leaving != was_leaving:
                self._on_change(member.state)
            self._close_if_over(member)
        self._on_sync()

    def _open(self, sessions: asyncio.TaskGroup, address: str) -> _Member:
        session = EngineSession(address, self._config, self._rng, self._take_change, self._connecting)
        breaker = Breaker(self._picking.failures_to_leave_out, self._picking.left_out_s, self._clock)
        return _Member(session, breaker, sessions.create_task(session.run(), name=f"engine session {address}"))

    def _close_if_over(self, member: _Member) -> None:
        address = member.session.address
        # Another may be at this address by now, when this one was closed under a request of its own.
        if not member.is_gone or member.session.state.num_in_flight or self._members.get(address) is not member:
            return
        del self._members[address]
        member.running.cancel()
        self._prefixes.forget(address)
        self._on_change(member.state)

    def _take_change(self, state: EndpointState) -> None:
        if not state.is_ready:
            self._prefixes.forget(state.address)
        self._on_change(state)
