"""OpenAI's chat completion, its chunks, and what deltas are in them.

Reasoning has no place in OpenAI's own objects; servers of open models say `reasoning_content` or `reasoning`, and
clients read one of them, so both are said.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from rempart_platform.apis.openai_objects import RenderContext, Usage
from rempart_platform.generation import Delta, TextLogprob, ToolCallDelta


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


class ChunkFunction(msgspec.Struct):
    arguments: str
    name: str | UnsetType = UNSET


class ChunkToolCall(msgspec.Struct):
    index: int
    function: ChunkFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChunkDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ChunkToolCall] | UnsetType = UNSET


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
    service_tier: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Function(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: Function
    type: str = "function"


class Message(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


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
    service_tier: str
    choices: list[Choice]
    usage: Usage


def message_of(deltas: Sequence[Delta]) -> Message:
    """The message that these deltas are; without text its content is null beside calls."""
    text = "".join(delta.text for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas) or UNSET
    calls = _whole_calls([call for delta in deltas for call in delta.tool_calls]) or UNSET
    content = None if calls and not text else text
    return Message(content, reasoning_content=reasoning, reasoning=reasoning, tool_calls=calls)


def _whole_calls(pieces: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """A piece with an id begins a call; the others go on with the call of their index."""
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    for piece in pieces:
        arguments[piece.index].append(piece.arguments)
    begun = (piece for piece in pieces if piece.id)
    return [ToolCall(piece.id, Function(piece.name, "".join(arguments[piece.index]))) for piece in begun]


def chunk_deltas(delta: Delta) -> Iterator[ChunkDelta]:
    """One for each piece of tool calls, because clients expect an index once in a chunk; else one, or none if empty."""
    for call in delta.tool_calls:
        yield ChunkDelta(tool_calls=[_chunk_call(call)])
    if delta.reasoning:
        yield ChunkDelta(reasoning_content=delta.reasoning, reasoning=delta.reasoning)
    if delta.text:
        yield ChunkDelta(content=delta.text)


def _chunk_call(call: ToolCallDelta) -> ChunkToolCall:
    if call.id:
        return ChunkToolCall(call.index, ChunkFunction(call.arguments, call.name), call.id, "function")
    return ChunkToolCall(call.index, ChunkFunction(call.arguments))


def logprobs_of(context: RenderContext, deltas: Sequence[Delta]) -> ChoiceLogprobs | None:
    """Of all tokens, those of reasoning and of calls too; None when none were asked for."""
    if not any(delta.logprobs for delta in deltas):
        return None
    return ChoiceLogprobs([_token(logprob) for delta in deltas for logprob in context.shown_logprobs(delta)])


def _token(logprob: TextLogprob) -> TokenLogprob:
    tops = [TopLogprob(top.token, top.logprob, list(top.token_bytes)) for top in logprob.top]
    return TokenLogprob(logprob.token, logprob.logprob, list(logprob.token_bytes), tops)
