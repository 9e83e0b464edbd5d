"""All endpoints of a router: one session each, and the choice among them."""

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from rempart_platform.endpoints import pick as picking
from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.session import EngineSession, SessionConfig
from rempart_platform.errors import ErrorKind, RempartError


def no_endpoint(model: str, retry_after_s: float) -> RempartError:
    """The answer when nothing can take a request for the model."""
    return RempartError(
        ErrorKind.UNAVAILABLE, f"No engine is ready to serve {model!r}. Try again.", retry_after_s=retry_after_s
    )


class EnginePool:
    """The sessions of a static list of addresses.

    Args:
        addresses: one endpoint each.
        config: for every session.
        rng: spreads requests over equal endpoints and jitters reconnects.
        on_change: told when an endpoint becomes ready, starts to drain, or is lost.
        retry_after_s: wait that is advised while no endpoint is ready.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        config: SessionConfig,
        rng: random.Random,
        on_change: Callable[[EndpointState], None] = lambda state: None,
        retry_after_s: float = 2.0,
    ) -> None:
        self._rng = rng
        self._retry_after_s = retry_after_s
        self._sessions = {address: EngineSession(address, config, rng, on_change) for address in addresses}

    async def run(self) -> None:
        """Keeps all sessions up until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for session in self._sessions.values():
                tasks.create_task(session.run(), name=f"engine session {session.address}")

    def states(self) -> tuple[EndpointState, ...]:
        """All endpoints at this moment."""
        return tuple(session.state for session in self._sessions.values())

    def can_serve(self, model: str, avoid: Collection[str] = ()) -> bool:
        """Whether some endpoint other than those to avoid can take a request for the model now."""
        return any(picking.can_take(state, model) and state.address not in avoid for state in self.states())

    @contextmanager
    def pick(self, model: str, num_tokens: int, avoid: Collection[str] = ()) -> Iterator[EngineSession]:
        """The session for a request of at most `num_tokens`, in flight there until the block is left.

        Raises:
            RempartError: UNAVAILABLE with the advised wait, when no endpoint can take it.
        """
        state = picking.pick(self.states(), model, self._rng, avoid)
        if state is None:
            raise no_endpoint(model, self._retry_after_s)
        session = self._sessions[state.address]
        with session.in_flight(num_tokens):
            yield session
