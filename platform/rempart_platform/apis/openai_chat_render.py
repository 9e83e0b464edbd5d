"""Events as OpenAI's chat completions and their chunks."""

from collections.abc import Sequence

from msgspec import UNSET

from rempart_platform import generation
from rempart_platform.apis.openai_chat_objects import (
    Choice,
    ChoiceLogprobs,
    Chunk,
    ChunkChoice,
    ChunkDelta,
    Completion,
    chunk_deltas,
    logprobs_of,
    message_of,
)
from rempart_platform.apis.openai_objects import RenderContext, TextFrame, Usage, encoder, server_sent
from rempart_platform.generation import Delta, Finished, GenerationEvent


class ChatRenderer:
    """One answer; remembers which choices have said their role."""

    def __init__(self, context: RenderContext) -> None:
        self._context = context
        self._id = f"chatcmpl-{context.request_id}"
        self._has_role: set[int] = set()
        self._frames: dict[int, TextFrame] = {}

    def chunk(self, event: GenerationEvent) -> bytes:
        match event:
            case Delta():
                return self._role(event.choice) + self._delta(event)
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

    def _delta(self, delta: Delta) -> bytes:
        """The log-probabilities come with the first chunk. An end token alone is worth none."""
        if delta.is_text_alone:
            return self._frame(delta.choice).around(delta.text)
        logprobs = logprobs_of(self._context, [delta])
        contents = [*chunk_deltas(delta)]
        if not contents and logprobs and logprobs.content:
            contents = [ChunkDelta(content="")]
        chunks = []
        for content in contents:
            chunks.append(self._choice(delta.choice, content, logprobs))
            logprobs = None
        return b"".join(chunks)

    def _frame(self, choice: int) -> TextFrame:
        """Of chunks that bring text and nothing else: nearly all."""
        if choice not in self._frames:
            self._frames[choice] = TextFrame(lambda text: self._choice(choice, ChunkDelta(content=text), None))
        return self._frames[choice]

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
                context.service_tier,
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
            context.service_tier,
            [self._whole_choice(end, events) for end in sorted(finished, key=lambda end: end.choice)],
            Usage.of(usage),
        )
        return encoder.encode(completion)

    def _whole_choice(self, end: Finished, events: Sequence[GenerationEvent]) -> Choice:
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == end.choice]
        return Choice(end.choice, message_of(deltas), logprobs_of(self._context, deltas), end.reason.value)
