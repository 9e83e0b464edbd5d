"""Objects that both OpenAI ways of generating answer with, and what a renderer is."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import msgspec

from rempart_platform import generation
from rempart_platform.generation import Delta, GenerationEvent, GenerationRequest, TextLogprob
from rempart_platform.models import ServedModel

DONE = b"data: [DONE]\n\n"
_ANY_TEXT = "\0the text\0"
"""Nothing else in a chunk is equal to it: no name holds a zero byte."""
encoder = msgspec.json.Encoder()


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens

    @classmethod
    def of(cls, usage: generation.Usage) -> "Usage":
        total = usage.prompt_tokens + usage.completion_tokens
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            total,
            CachedTokens(usage.cached_tokens),
            ReasoningTokens(usage.reasoning_tokens),
        )


@dataclass(frozen=True, slots=True)
class RenderContext:
    """What every chunk of an answer repeats. `silent_token_ids` have no text and so no log-probability either."""

    request_id: str
    created_s: int
    model: str
    fingerprint: str
    service_tier: str
    """The one that is used, which may be lower than the one that was asked for."""
    silent_token_ids: frozenset[int]
    include_usage: bool

    @classmethod
    def of(cls, request: GenerationRequest, model: ServedModel, *, include_usage: bool) -> "RenderContext":
        return cls(
            request_id=request.request_id,
            created_s=request.created_s,
            model=request.model,
            fingerprint=fingerprint(model.name, model.created_s, model.max_model_len, model.vocab_size),
            service_tier=request.service_tier.name.lower(),
            silent_token_ids=frozenset((*model.eos_token_ids, *request.sampling.stop_token_ids)),
            include_usage=include_usage,
        )

    def shown_logprobs(self, delta: Delta) -> list[TextLogprob]:
        """The log-probabilities of tokens that have text."""
        return [
            logprob
            for token_id, logprob in zip(delta.token_ids, delta.logprobs, strict=bool(delta.logprobs))
            if token_id not in self.silent_token_ids
        ]


class Renderer(Protocol):
    """Events to the bytes of one API."""

    def chunk(self, event: GenerationEvent) -> bytes:
        """The event as server-sent events; b"" when it has none."""
        ...

    def body(self, events: Sequence[GenerationEvent]) -> bytes:
        """All events, of which the last is the usage, as one JSON body."""
        ...


def server_sent(message: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + encoder.encode(message) + b"\n\n"


class TextFrame:
    """A chunk that is made once, and whose text changes.

    Args:
        render: the chunk with a text in it.
    """

    def __init__(self, render: Callable[[str], bytes]) -> None:
        self._before, self._after = render(_ANY_TEXT).split(encoder.encode(_ANY_TEXT))

    def around(self, text: str) -> bytes:
        """The chunk with this text."""
        return b"%b%b%b" % (self._before, encoder.encode(text), self._after)


@lru_cache(maxsize=256)
def fingerprint(*served: str | int) -> str:
    """Changes when any of that by which a model is served does."""
    text = "\0".join(map(str, served))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
