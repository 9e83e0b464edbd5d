"""What happened to one request: filled in on its way, read once at its end by the log and the metrics. Never text."""

import asyncio
from dataclasses import dataclass, field

from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.generation import Delta, Finished, GenerationEvent, GenerationRequest, Usage


@dataclass(slots=True)
class RequestTrace:
    """Times are seconds of one monotonic clock; None means that it did not come to that."""

    request: GenerationRequest
    started_s: float
    dispatched_s: float | None = None
    """The last time it was handed to an endpoint."""
    first_event_s: float | None = None
    """The engine's first event: from here on the prompt is charged."""
    first_delta_s: float | None = None
    last_delta_s: float | None = None
    ended_s: float = 0.0
    endpoints: list[str] = field(default_factory=list)
    """Addresses that were tried, in order."""
    num_completion_tokens: int = 0
    """Tokens that the consumer has taken."""
    num_reasoning_tokens: int = 0
    """Those of them that came as reasoning."""
    num_expected_cached_tokens: int = 0
    """What the last pick expected of `num_cached_tokens`."""
    num_cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    is_complete: bool = False
    error: ErrorKind | None = None
    violation: QuotaViolation | None = None

    @property
    def outcome(self) -> str:
        """ "ok", or the error's OpenAI code; a client that left early is "client_closed_request"."""
        if self.error is not None:
            return self.error.value.openai_code
        return "ok" if self.is_complete else ErrorKind.CLIENT_CLOSED.value.openai_code

    @property
    def usage(self) -> Usage:
        """What is charged if the request ends now: the prompt once the engine began, and the tokens delivered."""
        num_prompt_tokens = len(self.request.prompt_token_ids) if self.first_event_s is not None else 0
        return Usage(num_prompt_tokens, self.num_completion_tokens, self.num_cached_tokens, self.num_reasoning_tokens)

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_delta_s is None else self.first_delta_s - self.started_s

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time between two tokens of one choice after the first; None below two tokens a choice."""
        num_gaps = self.num_completion_tokens / self.request.num_choices - 1
        if self.first_delta_s is None or self.last_delta_s is None or num_gaps < 1:
            return None
        return (self.last_delta_s - self.first_delta_s) / num_gaps

    @property
    def was_never_served(self) -> bool:
        """Whether it failed by our fault before an engine began."""
        return self.first_event_s is None and self.error in (ErrorKind.UNAVAILABLE, ErrorKind.INTERNAL)

    def dispatched(self, endpoint: str, now_s: float, num_expected_cached_tokens: int = 0) -> None:
        """Counts a hand-over to an endpoint."""
        self.num_expected_cached_tokens = num_expected_cached_tokens
        self.endpoints.append(endpoint)
        self.dispatched_s = now_s

    def engine_began(self, num_cached_tokens: int, now_s: float) -> None:
        """Counts the engine's first event."""
        self.num_cached_tokens = num_cached_tokens
        self.first_event_s = now_s

    def delivered(self, event: GenerationEvent, now_s: float) -> None:
        """Counts an event as taken by the consumer."""
        match event:
            case Delta():
                self.num_completion_tokens += len(event.token_ids)
                if event.reasoning:
                    self.num_reasoning_tokens += len(event.token_ids)
                self.last_delta_s = now_s
                if self.first_delta_s is None:
                    self.first_delta_s = now_s
            case Finished():
                self.finish_reasons.append(event.reason.value)
            case Usage():
                pass

    def failed(self, error: BaseException) -> None:
        """Keeps what ended the request first; after its last event nothing can fail it any more."""
        if self.is_complete or self.error is not None:
            return
        if isinstance(error, RempartError):
            self.error = error.kind
            self.violation = error.violation
        elif isinstance(error, asyncio.CancelledError | GeneratorExit | OSError):
            self.error = ErrorKind.CLIENT_CLOSED
        else:
            self.error = ErrorKind.INTERNAL
