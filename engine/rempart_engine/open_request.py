"""What the front remembers of a request until its last choice has ended."""

from collections.abc import Iterator

from rempart_engine.core.request import FinishReason, Request, RequestId
from rempart_engine.core.step import EventError, TokenEvent
from rempart_engine.session import CallerSession


class OpenRequest:
    """One request that the core works on, with the session that hears of it."""

    def __init__(self, request: Request, caller_id: str, session: CallerSession, received_at: float) -> None:
        self.core_id: RequestId = request.request_id
        self.caller_id = caller_id
        self.session: CallerSession | None = session
        """None once its caller has gone or has been told the end."""
        self.received_at = received_at
        self.first_token_at: float | None = None
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._next_index = dict.fromkeys(range(request.sampling.n), request.num_emitted_tokens)
        """Of the choices that have not ended."""
        self._finish_reasons: list[FinishReason] = []

    @property
    def is_over(self) -> bool:
        """Every choice has ended."""
        return not self._next_index

    def follow(self, event: TokenEvent) -> None:
        """Take note of an event of this request."""
        self.num_output_tokens += len(event.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        if event.finish_reason is not None:
            self._next_index.pop(event.choice, None)
            self._finish_reasons.append(event.finish_reason)
        elif event.choice in self._next_index:
            self._next_index[event.choice] = event.index + len(event.token_ids)

    def last_events(self, reason: FinishReason, error: EventError) -> Iterator[TokenEvent]:
        """An end for every choice that has none yet."""
        for choice, index in self._next_index.items():
            yield TokenEvent(self.core_id, choice, index, finish_reason=reason, error=error)

    def summary(self) -> dict[str, object]:
        """For the log; no token ids."""
        return {
            "request_id": self.core_id,
            "finish_reasons": [reason.value for reason in self._finish_reasons],
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_output_tokens": self.num_output_tokens,
        }
