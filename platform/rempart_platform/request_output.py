"""Token events of one request to the events its client sees.

Events of a choice that have come together become one Delta, so a client that is slower than the engine gets fewer and
longer pieces instead of a growing backlog.
"""

from collections.abc import Sequence

from rempart_platform.generation import Delta, Finished, FinishReason, GenerationEvent, GenerationRequest, TextLogprob
from rempart_platform.models import ServedModel
from rempart_platform.text.assembler import TextAssembler
from rempart_platform.text.logprobs import text_logprobs
from rempart_platform.text.stop_strings import StopStrings
from rempart_platform.text.tokenizer import Tokenizer
from rempart_protos.v1 import engine_pb2, sampling_pb2

_FINISH_REASONS = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class ChoiceOutput:
    """One choice: gathers token events, gives out text."""

    def __init__(self, choice: int, tokenizer: Tokenizer, assembler: TextAssembler) -> None:
        self.choice = choice
        self.is_finished = False
        self._tokenizer = tokenizer
        self._assembler = assembler
        self._token_ids: list[int] = []
        self._logprobs: list[TextLogprob] = []
        self._reason: FinishReason | None = None

    def add(self, event: engine_pb2.TokenEvent) -> None:
        """Takes the choice's next event. After a stop string the engine may still send some; they count for nothing."""
        self._token_ids.extend(event.token_ids)
        if event.logprobs:
            self._logprobs.extend(text_logprobs(self._tokenizer, event.token_ids, event.logprobs))
        if event.finish_reason:
            self._reason = _FINISH_REASONS[event.finish_reason]

    def take(self) -> list[GenerationEvent]:
        """What the events added since the last call bring to the client."""
        if self.is_finished or not (self._token_ids or self._reason):
            return []
        increment = self._assembler.push(self._token_ids, self._logprobs)
        text, token_ids, logprobs = increment.text, increment.token_ids, increment.logprobs
        reason = FinishReason.STOP if increment.is_stopped else self._reason
        self._token_ids, self._logprobs = [], []
        if reason is not None and not increment.is_stopped:
            rest = self._assembler.finish()
            text, token_ids, logprobs = text + rest.text, token_ids + rest.token_ids, logprobs + rest.logprobs
            reason = FinishReason.STOP if rest.is_stopped else reason
        events: list[GenerationEvent] = [Delta(self.choice, text, token_ids, logprobs)] if text or token_ids else []
        if reason is not None:
            self.is_finished = True
            events.append(Finished(self.choice, reason))
        return events


class RequestOutput:
    """All choices of one request."""

    def __init__(self, request: GenerationRequest, model: ServedModel) -> None:
        stop = StopStrings(request.stop)
        silent_ids = (*model.eos_token_ids, *request.sampling.stop_token_ids)
        self._choices = [
            ChoiceOutput(
                choice,
                model.tokenizer,
                TextAssembler(model.tokenizer, stop, request.include_stop, silent_ids, request.sampling.min_tokens),
            )
            for choice in range(request.num_choices)
        ]

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.is_finished for choice in self._choices)

    def push(self, token_events: Sequence[engine_pb2.TokenEvent]) -> list[GenerationEvent]:
        """What these events bring to the client, in order per choice."""
        for event in token_events:
            self._choices[event.choice].add(event)
        return [event for choice in self._choices for event in choice.take()]
