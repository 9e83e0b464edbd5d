"""Events as OpenAI's chat completions and their chunks."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from rempart_platform import generation
from rempart_platform.apis.openai_objects import RenderContext, Usage, encoder, server_sent
from rempart_platform.generation import Delta, Finished, GenerationEvent, TextLogprob


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ChunkDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: ChunkDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Message(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class Choice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChatRenderer:
    """One answer; remembers which choices have said their role."""

    def __init__(self, context: RenderContext) -> None:
        self._context = context
        self._id = f"chatcmpl-{context.request_id}"
        self._has_role: set[int] = set()

    def chunk(self, event: GenerationEvent) -> bytes:
        match event:
            case Delta():
                delta = ChunkDelta(content=event.text)
                return self._role(event.choice) + self._choice(event.choice, delta, _logprobs(self._context, [event]))
            case Finished():
                choice = ChunkChoice(event.choice, ChunkDelta(), finish_reason=event.reason.value)
                return self._role(event.choice) + self._chunk([choice])
            case generation.Usage():
                return self._chunk([], Usage.of(event)) if self._context.include_usage else b""

    def _role(self, choice: int) -> bytes:
        """The first chunk of a choice, once."""
        if choice in self._has_role:
            return b""
        self._has_role.add(choice)
        return self._choice(choice, ChunkDelta(role="assistant", content=""), None)

    def _choice(self, index: int, delta: ChunkDelta, logprobs: ChoiceLogprobs | None) -> bytes:
        return self._chunk([ChunkChoice(index, delta, logprobs)])

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        context = self._context
        return server_sent(
            Chunk(
                self._id,
                "chat.completion.chunk",
                context.created_s,
                context.model,
                context.fingerprint,
                choices,
                usage if context.include_usage else UNSET,
            )
        )

    def body(self, events: Sequence[GenerationEvent]) -> bytes:
        context = self._context
        finished = [event for event in events if isinstance(event, Finished)]
        usage = next(event for event in events if isinstance(event, generation.Usage))
        completion = Completion(
            self._id,
            "chat.completion",
            context.created_s,
            context.model,
            context.fingerprint,
            [self._whole_choice(end, events) for end in sorted(finished, key=lambda end: end.choice)],
            Usage.of(usage),
        )
        return encoder.encode(completion)

    def _whole_choice(self, end: Finished, events: Sequence[GenerationEvent]) -> Choice:
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == end.choice]
        text = "".join(delta.text for delta in deltas)
        return Choice(end.choice, Message(text), _logprobs(self._context, deltas), end.reason.value)


def _logprobs(context: RenderContext, deltas: Sequence[Delta]) -> ChoiceLogprobs | None:
    if not any(delta.logprobs for delta in deltas):
        return None
    return ChoiceLogprobs([_token(logprob) for delta in deltas for logprob in context.shown_logprobs(delta)])


def _token(logprob: TextLogprob) -> TokenLogprob:
    tops = [TopLogprob(top.token, top.logprob, list(top.token_bytes)) for top in logprob.top]
    return TokenLogprob(logprob.token, logprob.logprob, list(logprob.token_bytes), tops)
