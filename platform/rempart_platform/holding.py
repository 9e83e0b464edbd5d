"""Requests that wait for a first engine of their model, so that one that is scaled to zero can wake up.

    no engine ready ──► wait (without_engine_s) ──► an engine is ready: all go on, to the fair queue
                            │ too many wait ──► 503, 429 of the tenant
                            │ none came ──────► 503          its own time is over ──► 504

A request here holds its reservation and nothing else: no place in the queue, no part of an engine. A line of a batch
would keep others from its place, so it is turned away at once, and counts as waiting until it comes again.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from rempart_platform.bounds import require_positive
from rempart_platform.endpoints.pool import no_endpoint
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError

_RETRY_AFTER_S = 5.0
_COMES_AGAIN_S = 8.0  # after that wait, and what makes it uneven


@dataclass(frozen=True, slots=True)
class HoldConfig:
    """How requests wait for a first engine of their model."""

    without_engine_s: float = 0.0
    """How long at most; 0 refuses them at once."""
    max_per_model: int = 1000
    """Requests that may wait so for one model."""
    max_per_tenant: int = 100
    """Requests of one tenant that may wait so, for all models together."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("without_engine_s",))


class HoldingRoom:
    """Where these requests wait.

    Args:
        config: how long and how many.
        is_served: whether a model has an engine that is ready.
        count: counts a request of a model while it waits.
        comes_again_s: how long one that was turned away counts.
    """

    def __init__(
        self,
        config: HoldConfig,
        is_served: Callable[[str], bool],
        count: Callable[[str], AbstractContextManager[None]],
        *,
        comes_again_s: float = _COMES_AGAIN_S,
    ) -> None:
        self._config = config
        self._is_served = is_served
        self._count = count
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._tenants: Counter[str] = Counter()
        self._comes_again_s = comes_again_s
        self._turned_away: defaultdict[str, set[ExitStack]] = defaultdict(set)

    def check(self) -> None:
        """To be called when an endpoint changed."""
        for model, waiting in self._waiting.items():
            if waiting and self._is_served(model):
                for each in waiting:
                    if not each.done():
                        each.set_result(None)
        for model, turned_away in self._turned_away.items():
            if turned_away and self._is_served(model):
                for counted in tuple(turned_away):
                    counted.close()

    def turn_away(self, model: str) -> RempartError:
        """What one is told that comes again by itself. Until then it counts, so that an engine wakes up for it."""
        counted = ExitStack()
        counted.enter_context(self._count(model))
        self._turned_away[model].add(counted)
        counted.callback(self._turned_away[model].discard, counted)
        asyncio.get_running_loop().call_later(self._comes_again_s, counted.close)
        return no_endpoint(model, _RETRY_AFTER_S)

    async def wait(self, model: str, tenant: str, timeout_s: float) -> None:
        """Returns once the model has a ready engine; at once when it has one.

        Args:
            model: that is to be served.
            tenant: whose request it is.
            timeout_s: that the request has left.

        Raises:
            RempartError: UNAVAILABLE, RATE_LIMIT_EXCEEDED or DEADLINE_EXCEEDED, as in the picture.
        """
        if self._is_served(model):
            return
        waiting = self._waiting[model]
        self._require_room(model, tenant, len(waiting))
        served = asyncio.get_running_loop().create_future()
        waiting.add(served)
        self._tenants[tenant] += 1
        try:
            with self._count(model):
                async with asyncio.timeout(min(self._config.without_engine_s, timeout_s)):
                    await served
        except TimeoutError:
            if timeout_s <= self._config.without_engine_s:
                message = f"The request ran out of time after waiting {timeout_s:.1f} s for an engine."
                raise RempartError(ErrorKind.DEADLINE_EXCEEDED, message) from None
            raise no_endpoint(model, _RETRY_AFTER_S) from None
        finally:
            waiting.remove(served)
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]

    def _require_room(self, model: str, tenant: str, num_waiting: int) -> None:
        config = self._config
        if num_waiting >= config.max_per_model:
            message = (
                f"{config.max_per_model} requests wait for an engine of {model!r}, and no more may "
                "(hold_max_per_model). Try again."
            )
            raise RempartError(ErrorKind.UNAVAILABLE, message, retry_after_s=_RETRY_AFTER_S)
        if self._tenants[tenant] >= config.max_per_tenant:
            message = (
                f"The limit of {config.max_per_tenant} requests that wait for an engine is reached "
                "(hold_max_per_tenant)."
            )
            violation = QuotaViolation(tenant, "held", config.max_per_tenant)
            raise RempartError(
                ErrorKind.RATE_LIMIT_EXCEEDED, message, retry_after_s=_RETRY_AFTER_S, violation=violation
            )
