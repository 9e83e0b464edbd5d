"""Events as OpenAI's (text) completions and their chunks."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from rempart_platform import generation
from rempart_platform.apis.openai_objects import RenderContext, TextFrame, Usage, encoder, server_sent
from rempart_platform.generation import Delta, Finished, GenerationEvent


class Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    service_tier: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


class CompletionRenderer:
    """One answer; counts each choice's characters for `text_offset`."""

    def __init__(self, context: RenderContext) -> None:
        self._context = context
        self._num_chars: defaultdict[int, int] = defaultdict(int)
        self._frames: dict[int, TextFrame] = {}

    def chunk(self, event: GenerationEvent) -> bytes:
        match event:
            case Delta() if event.is_text_alone:
                self._num_chars[event.choice] += len(event.text)
                return self._frame(event.choice).around(event.text)
            case Delta():
                return self._chunk([Choice(event.choice, event.text, self._logprobs(event.choice, [event]))])
            case Finished():
                return self._chunk([Choice(event.choice, "", finish_reason=event.reason.value)])
            case generation.Usage():
                return self._chunk([], Usage.of(event)) if self._context.include_usage else b""

    def _frame(self, choice: int) -> TextFrame:
        """Of chunks that bring text and nothing else: nearly all."""
        if choice not in self._frames:
            self._frames[choice] = TextFrame(lambda text: self._chunk([Choice(choice, text)]))
        return self._frames[choice]

    def _chunk(self, choices: list[Choice], usage: Usage | None = None) -> bytes:
        return server_sent(self._completion(choices, usage if self._context.include_usage else UNSET))

    def _completion(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        context = self._context
        return Completion(
            f"cmpl-{context.request_id}",
            "text_completion",
            context.created_s,
            context.model,
            context.fingerprint,
            context.service_tier,
            choices,
            usage,
        )

    def body(self, events: Sequence[GenerationEvent]) -> bytes:
        finished = [event for event in events if isinstance(event, Finished)]
        usage = next(event for event in events if isinstance(event, generation.Usage))
        choices = [self._whole_choice(end, events) for end in sorted(finished, key=lambda end: end.choice)]
        return encoder.encode(self._completion(choices, Usage.of(usage)))

    def _whole_choice(self, end: Finished, events: Sequence[GenerationEvent]) -> Choice:
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == end.choice]
        text = "".join(delta.text for delta in deltas)
        return Choice(end.choice, text, self._logprobs(end.choice, deltas), end.reason.value)

    def _logprobs(self, choice: int, deltas: Sequence[Delta]) -> Logprobs | None:
        """Of consecutive deltas. Offsets count the tokens' own characters, from the start of the choice's text."""
        if not any(delta.logprobs for delta in deltas):
            self._num_chars[choice] += sum(len(delta.text) for delta in deltas)
            return None
        logprobs = Logprobs([], [], [], [])
        for delta in deltas:
            for shown in self._context.shown_logprobs(delta):
                logprobs.tokens.append(shown.token)
                logprobs.token_logprobs.append(shown.logprob)
                logprobs.top_logprobs.append({top.token: top.logprob for top in shown.top})
                logprobs.text_offset.append(self._num_chars[choice])
                self._num_chars[choice] += len(shown.token)
        return logprobs
