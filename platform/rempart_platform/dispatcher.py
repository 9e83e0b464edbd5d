"""One request's whole way, from admission to the one unwind that every ending takes.

    async with dispatcher.admit(request) as generation:
        an endpoint must be ready for the model, or to come ───► 503
        reserve the worst case from the tenant's quota ────────► 429 with the true wait
        where none is ready, wait for a first one ─────────────► 503; 504
        wait for room in the engines, fairly ──────────────────► 429, 503 when too many wait; 504
        generation.headers
        async for event in generation.events():
        ┌─► pick an endpoint ── in-flight +1
        │   session.generate ── token events ──► text without stop strings ──► Delta*, Finished of each choice
        └── engine unavailable and nothing delivered yet: once more, elsewhere
            settle ──► Usage
    unwind:  abort what still runs, in-flight -1 · give back the place · settle what was delivered · metrics · log line

Only tokens whose event the front end has taken are charged; the prompt is charged once the engine has begun.
"""

import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rempart_platform.endpoints.pick import PickRequest
from rempart_platform.endpoints.pool import EnginePool, no_endpoint
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, GenerationEvent, GenerationRequest, Usage
from rempart_platform.holding import HoldingRoom
from rempart_platform.metrics import RouterMetrics
from rempart_platform.models import ModelCatalog
from rempart_platform.request_log import log_request
from rempart_platform.request_output import RequestOutput
from rempart_platform.request_trace import RequestTrace
from rempart_platform.tenancy.queue_values import Place, QueueRequest
from rempart_platform.tenancy.reservation import Reservation
from rempart_protos.v1 import engine_pb2


class QuotaLedger(Protocol):
    """What dispatch needs of quotas; `tenancy.quota.Ledger` in production."""

    async def reserve(
        self, tenant: str, request_id: str, tokens: int, *, model: str = "", key_id: str = "", prompt_tokens: int = 0
    ) -> Reservation:
        """Raises RempartError when the tenant may not; holds nothing then, nor when it is cancelled."""

    async def settle(self, reservation: Reservation, usage: Usage, model: str) -> None:
        """Ends the reservation with what was used, even when it is cancelled."""

    async def refund(self, reservation: Reservation) -> None:
        """Ends the reservation as if it had never been made, even when it is cancelled."""


class RequestAudit(Protocol):
    """What dispatch needs of the audit log; `audit.log.AuditLog` in production."""

    def require_room(self) -> None:
        """Raises RempartError when no new request could be recorded."""

    def request_ended(self, trace: RequestTrace) -> None:
        """Records a request, once."""


class RequestQueue(Protocol):
    """What dispatch needs of the queue; `tenancy.fair_queue.FairQueue` in production."""

    async def acquire(self, request: QueueRequest) -> Place:
        """Waits for room in the engines. Raises RempartError; holds nothing then, nor when it is cancelled."""

    def release(self, place: Place, usage: Usage) -> None:
        """Gives it back with what was used. Again is harmless."""


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """How requests are dispatched."""

    cache_secret: bytes = field(repr=False)
    """Key of the prefix-cache salts. All routers of the same engines share it, or share no cache."""
    max_attempts: int = 2
    """Endpoints that one request may be handed to."""
    default_timeout_s: float = 600.0
    """For requests without a deadline of their own."""
    gather_s: float = 0.05
    """Between two times that tokens are taken of an answer that is handed out whole. An end is never waited for, nor a
    stop string, behind which the engine would compute in vain."""
    retry_after_s: float = 2.0
    """The wait that is advised while no endpoint is ready."""


class Generation:
    """An admitted request."""

    def __init__(self, headers: Mapping[str, str], events: AsyncGenerator[GenerationEvent, None]) -> None:
        self.headers = dict(headers)
        """x-ratelimit-*, for the response."""
        self._events = events

    def events(self) -> AsyncIterator[GenerationEvent]:
        """Deltas, Finished of every choice, Usage last. To be read once.

        Raises:
            RempartError: the request cannot go on; nothing comes after it.
        """
        return self._events


class Dispatcher:
    """Takes valid requests through quota, endpoint and text.

    Args:
        ledger: quotas.
        queue: where requests wait for room in the engines; None hands each to an engine at once.
        audit: records every request; None for none.
        holding: where requests wait for a first endpoint of their model; None refuses them at once.
        pool: endpoints.
        catalog: what turns token ids to text, by model.
        config: limits and the salt's secret.
        metrics: told of every request.
    """

    def __init__(
        self,
        *,
        ledger: QuotaLedger,
        pool: EnginePool,
        catalog: ModelCatalog,
        config: DispatchConfig,
        metrics: RouterMetrics,
        queue: RequestQueue | None = None,
        audit: RequestAudit | None = None,
        holding: HoldingRoom | None = None,
    ) -> None:
        self._ledger = ledger
        self._queue = queue
        self._audit = audit
        self._holding = holding
        self._pool = pool
        self._catalog = catalog
        self._config = config
        self._metrics = metrics
        self._clock = time.monotonic

    @asynccontextmanager
    async def admit(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """Admits a request; leaving the block ends it, whatever state it is in.

        Raises:
            RempartError: RATE_LIMIT_EXCEEDED, UNAVAILABLE or what else quota or queue say, before anything was charged.
        """
        if request.comes_again and not self._pool.can_serve(request.model):
            raise self._come_again(request.model)  # nothing ended: its batch counts how often it is asked
        trace = RequestTrace(request, self._clock())
        try:
            if self._audit is not None:
                self._audit.require_room()
            self._require_endpoint(request.model)
            reservation = await self._ledger.reserve(
                request.caller.tenant,
                request.request_id,
                request.worst_case_tokens,
                model=request.model,
                key_id=request.caller.key_id,
                prompt_tokens=len(request.prompt_token_ids),
            )
            place = await self._wait_for_room(trace, reservation)
        except BaseException as error:
            trace.failed(error)
            self._report(trace)
            raise
        self._metrics.request_admitted(trace)
        settlement = _Settlement(self._ledger, reservation, self._queue, place, trace)
        events = self._relay(trace, settlement)
        try:
            yield Generation(reservation.headers, events)
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            try:
                await events.aclose()
                self._metrics.request_left(trace, reservation.price.cost(trace.usage))
                self._report(trace)
            finally:  # what is not settled would be renewed, and count, for ever
                await settlement.settle()

    def _come_again(self, model: str) -> RempartError:
        if self._holding is not None and not self._pool.is_served(model):
            return self._holding.turn_away(model)
        return no_endpoint(model, self._config.retry_after_s)

    def _require_endpoint(self, model: str) -> None:
        """What is worth to wait for is a first endpoint; one that fails again and again is refused as ever."""
        may_wait = self._holding is not None and not self._pool.is_served(model)
        if not may_wait and not self._pool.can_serve(model):
            raise no_endpoint(model, self._config.retry_after_s)

    async def _wait_for_room(self, trace: RequestTrace, reservation: Reservation) -> Place | None:
        """A place in the engines, where there is a queue. Without one the reservation is as if never made."""
        request = trace.request
        try:
            with self._metrics.scaling.waiting(request):
                if self._holding is not None and not request.comes_again:
                    await self._holding.wait(request.model, request.caller.tenant, self._time_left_s(trace))
                if self._queue is None:
                    return None
                return await self._queue.acquire(self._queue_request(trace))
        except BaseException:
            await self._ledger.refund(reservation)
            raise

    def _queue_request(self, trace: RequestTrace) -> QueueRequest:
        request = trace.request
        return QueueRequest(
            request.request_id,
            request.caller.tenant,
            request.model,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.num_choices * request.sampling.max_tokens,
            num_rows=request.num_choices,
            timeout_s=self._time_left_s(trace),
            service_tier=request.service_tier,
            weight=request.caller.standing.weight,
        )

    async def _relay(self, trace: RequestTrace, settlement: "_Settlement") -> AsyncGenerator[GenerationEvent, None]:
        request = trace.request
        model = self._catalog.get(request.model)
        asked = self._pick_request(request)
        while True:
            output = RequestOutput(request, model)
            try:
                with (
                    self._pool.pick(asked, avoid=trace.endpoints) as attempt,
                    attempt.generate(self._engine_request(trace, asked.cache_salt)) as stream,
                ):
                    trace.dispatched(attempt.address, self._clock(), attempt.expected_cached_tokens)
                    if request.is_whole and not request.stop:
                        stream.gather(self._config.gather_s)
                    async for token_events in stream:
                        if trace.first_event_s is None:
                            attempt.began()
                            trace.engine_began(token_events[0].num_cached_tokens, self._clock())
                        for event in output.push(token_events):
                            trace.delivered(event, self._clock())
                            yield event
                        if output.is_finished:
                            break
                break
            except RempartError as error:
                self._metrics.attempt_failed(request.model, error.answer.openai_code)
                if not self._may_retry(error, trace):
                    trace.failed(error)
                    raise
                self._metrics.retried(request.model)
        trace.is_complete = True
        await settlement.settle()  # before the client learns that it is over and sends its next request
        yield trace.usage

    def _may_retry(self, error: RempartError, trace: RequestTrace) -> bool:
        """An engine that was not there costs the client nothing while it has seen nothing."""
        return (
            error.kind is ErrorKind.UNAVAILABLE
            and trace.first_event_s is None
            and 0 < len(trace.endpoints) < self._config.max_attempts
            and self._pool.can_serve(trace.request.model, avoid=trace.endpoints)
        )

    def _pick_request(self, request: GenerationRequest) -> PickRequest:
        return PickRequest(
            request.model,
            request.prompt_token_ids,
            cache_salt(self._config.cache_secret, request.caller, request.prompt_cache_key),
            max_output_tokens=request.sampling.max_tokens,
            num_choices=request.num_choices,
        )

    def _engine_request(self, trace: RequestTrace, salt: bytes) -> engine_pb2.GenerateRequest:
        request = trace.request
        attempt = len(trace.endpoints)
        return engine_pb2.GenerateRequest(
            # An engine may still be busy with the attempt before; its events must not be taken for this one's.
            request_id=request.request_id if attempt == 0 else f"{request.request_id}.{attempt}",
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            timeout_s=self._time_left_s(trace),
            cache_salt=salt,
        )

    def _time_left_s(self, trace: RequestTrace) -> float:
        timeout_s = trace.request.timeout_s
        if timeout_s is None:
            timeout_s = self._config.default_timeout_s
        return max(timeout_s - (self._clock() - trace.started_s), 0.0)

    def _report(self, trace: RequestTrace) -> None:
        trace.ended_s = self._clock()
        self._metrics.request_ended(trace)
        if self._audit is not None:
            self._audit.request_ended(trace)
        log_request(trace)


class _Settlement:
    """Ends one reservation and one place in the engines, once."""

    def __init__(
        self,
        ledger: QuotaLedger,
        reservation: Reservation,
        queue: RequestQueue | None,
        place: Place | None,
        trace: RequestTrace,
    ) -> None:
        self._ledger = ledger
        self._reservation = reservation
        self._queue = queue
        self._place = place
        self._trace = trace
        self._is_settled = False

    async def settle(self) -> None:
        """Charges what was delivered; a request that no engine could begin counts as never made."""
        if self._is_settled:
            return
        self._is_settled = True
        if self._queue is not None and self._place is not None:
            self._queue.release(self._place, self._trace.usage)  # first, for somebody may wait for it
        if self._trace.was_never_served:
            await self._ledger.refund(self._reservation)
        else:
            await self._ledger.settle(self._reservation, self._trace.usage, self._trace.request.model)


def cache_salt(secret: bytes, caller: Caller, prompt_cache_key: str) -> bytes:
    """Start of the prefix-cache hash chain. 32 bytes.

    Equal only for requests under one key of one tenant, or of tenants of one cache group: these can tell by the time to
    the first token whether another of them sent the same beginning of a prompt lately. No tenant's name begins with a
    zero byte, so a group's salt is no tenant's.
    """
    group = caller.standing.cache_group
    scope = b"\0group\0" + group.encode() if group else caller.tenant.encode()
    return hmac.digest(secret, scope + b"\0" + prompt_cache_key.encode(), "sha256")
