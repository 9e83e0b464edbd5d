"""Lines of batch jobs on the way of online requests, at the batch tier."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from rempart_platform import validation
from rempart_platform.apis.openai_errors import error_body
from rempart_platform.apis.openai_generation import Prepare, Prepared, prepare_chat, prepare_completion, with_preface
from rempart_platform.apis.services import ApiServices
from rempart_platform.batch.values import LineAnswer
from rempart_platform.errors import RempartError, internal_error, invalid_request
from rempart_platform.generation import Caller
from rempart_platform.validation import Arrival

_logger = logging.getLogger(__name__)

_PREPARE: dict[str, Prepare] = {"/v1/chat/completions": prepare_chat, "/v1/completions": prepare_completion}
_OK = 200


class OnlineLineRunner:
    """Answers single lines; see `batch.values.LineRunner`.

    Args:
        services: what the front ends have.
        renew: a caller as it is now, with no tier above batch; raises RempartError when it may not ask any more.
    """

    def __init__(self, services: ApiServices, renew: Callable[[Caller], Awaitable[Caller]]) -> None:
        self._services = services
        self._renew = renew

    async def __call__(self, caller: Caller, endpoint: str, body: bytes, timeout_s: float) -> LineAnswer:
        arrival = Arrival(
            request_id=validation.mint_request_id(),
            caller=caller,
            created_s=int(self._services.clock()),
            seed=validation.mint_seed(),
            timeout_s=timeout_s,
        )
        try:
            now = replace(arrival, caller=await self._renew(caller))
            return LineAnswer(_OK, arrival.request_id, await self._answer(endpoint, body, now))
        except RempartError as error:
            return _refused(error, arrival)
        except Exception:
            _logger.exception("a line of a batch failed", extra={"fields": {"request_id": arrival.request_id}})
            return _refused(internal_error(), arrival)

    async def _answer(self, endpoint: str, body: bytes, arrival: Arrival) -> bytes:
        prepared = await self._prepared(endpoint, body, arrival)
        async with self._services.dispatcher.admit(replace(prepared.request, comes_again=True)) as generation:
            events = [event async for event in with_preface(prepared, generation.events())]
        return prepared.renderer.body(events)

    async def _prepared(self, endpoint: str, body: bytes, arrival: Arrival) -> Prepared:
        prepare = _PREPARE.get(endpoint)
        if prepare is None:
            raise invalid_request(f"Batches cannot use the endpoint {endpoint}.", "url")
        prepared = await prepare(body, self._services, arrival)
        if prepared.is_stream:
            raise invalid_request("'stream' must be false or absent in a batch.", "stream")
        return prepared


def _refused(error: RempartError, arrival: Arrival) -> LineAnswer:
    return LineAnswer(error.answer.http_status, arrival.request_id, error_body(error), error)
