"""Token events of one request to the events its client sees.

    token ids ─► TextAssembler ─► text without stop strings ─► answer ─► Delta* of text, reasoning, tool calls

Events of a choice that have come together become one Delta of each kind, so a client that is slower than the engine
gets fewer and longer pieces instead of a growing backlog.

Stop strings are looked for in what the model writes, before it is taken apart: one that appears in its reasoning or in
a call ends the output too, as it does with other servers of such models.
"""

from collections.abc import Sequence

from rempart_platform.answer import ParsedAnswer, PlainAnswer
from rempart_platform.generation import Finished, FinishReason, GenerationEvent, GenerationRequest, TextLogprob
from rempart_platform.models import ServedModel
from rempart_platform.text.assembler import TextAssembler, TextIncrement
from rempart_platform.text.logprobs import text_logprobs
from rempart_platform.text.stop_strings import StopStrings
from rempart_platform.text.tokenizer import Tokenizer
from rempart_protos.v1 import engine_pb2, sampling_pb2

_FINISH_REASONS = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class ChoiceOutput:
    """One choice: gathers token events, gives out text, reasoning and tool calls."""

    def __init__(
        self, choice: int, tokenizer: Tokenizer, assembler: TextAssembler, answer: PlainAnswer | ParsedAnswer
    ) -> None:
        self.choice = choice
        self.is_finished = False
        self._tokenizer = tokenizer
        self._assembler = assembler
        self._answer = answer
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
        increment = self._assemble()
        events: list[GenerationEvent] = [*self._answer.push(increment)]
        reason = self._reason_after(increment)
        if reason is not None:
            self.is_finished = True
            events += [*self._answer.finish(), Finished(self.choice, reason)]
        return events

    def _assemble(self) -> TextIncrement:
        increment = self._assembler.push(self._token_ids, self._logprobs)
        self._token_ids, self._logprobs = [], []
        if self._reason is None or increment.is_stopped:
            return increment
        return increment.then(self._assembler.finish())

    def _reason_after(self, increment: TextIncrement) -> FinishReason | None:
        """Why the choice has ended; None when it has not. A stop string may have cut a call, so it is no TOOL_CALLS."""
        if self._answer.is_over:
            return FinishReason.TOOL_CALLS
        if increment.is_stopped:
            return FinishReason.STOP
        if self._reason is FinishReason.STOP and self._answer.has_tool_calls:
            return FinishReason.TOOL_CALLS
        return self._reason


class RequestOutput:
    """All choices of one attempt at a request; another attempt begins afresh."""

    def __init__(self, request: GenerationRequest, model: ServedModel) -> None:
        stop = StopStrings(request.stop)
        silent_ids = (*model.eos_token_ids, *request.sampling.stop_token_ids)
        self._choices = [
            ChoiceOutput(
                choice,
                model.tokenizer,
                TextAssembler(model.tokenizer, stop, request.include_stop, silent_ids, request.sampling.min_tokens),
                _new_answer(choice, request, model),
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


def _new_answer(choice: int, request: GenerationRequest, model: ServedModel) -> PlainAnswer | ParsedAnswer:
    if request.conversation is None or model.chat_format is None:
        return PlainAnswer(choice)
    parser = model.chat_format.output_parser(request.conversation)
    return PlainAnswer(choice) if parser is None else ParsedAnswer(choice, parser, request.max_tool_calls)
