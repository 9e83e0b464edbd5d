"""What an OpenAI client may send, and the same as `rempart.v1` messages.

Beyond OpenAI's own fields these are understood, as vLLM names them: top_k, min_p, repetition_penalty, min_tokens,
ignore_eos, stop_token_ids, allowed_token_ids, include_stop_str_in_output.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from rempart_platform.apis.openai_conversation import (
    MessageBody,
    ResponseFormatBody,
    TemplateKwargs,
    ToolBody,
    ToolChoiceBody,
    chat_messages,
    shape_prompt,
)
from rempart_platform.errors import invalid_request
from rempart_protos.v1 import inference_pb2, sampling_pb2

_TIERS = {
    "auto": inference_pb2.SERVICE_TIER_UNSPECIFIED,
    "default": inference_pb2.SERVICE_TIER_DEFAULT,
    "flex": inference_pb2.SERVICE_TIER_FLEX,
    "priority": inference_pb2.SERVICE_TIER_PRIORITY,
    "batch": inference_pb2.SERVICE_TIER_BATCH,
}
"""OpenAI's names; batch beside them, which OpenAI has for batch jobs alone."""

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """Fields of both ways of generating. None and absent mean the same."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**32 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[UInt32, float] | None = None
    allowed_token_ids: list[UInt32] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    min_tokens: UInt32 | None = None
    max_tokens: UInt32 | None = None
    n: UInt32 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[UInt32] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    service_tier: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(GenerationBody, kw_only=True):
    messages: list[MessageBody]
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormatBody | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateKwargs | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[str | UInt32 | list[UInt32]]
    echo: bool | None = None
    logprobs: UInt32 | None = None
    best_of: UInt32 | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | ToolChoiceBody | None = None
    response_format: ResponseFormatBody | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


def chat_request(body: ChatBody) -> inference_pb2.ChatRequest:
    """Raises RempartError INVALID_REQUEST for what cannot be said in a ChatRequest."""
    options = _options(body)
    if body.max_completion_tokens is not None:
        options.sampling.max_tokens = body.max_completion_tokens
    if body.logprobs:
        options.sampling.logprobs = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise invalid_request("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    request = inference_pb2.ChatRequest(
        model=body.model,
        messages=chat_messages(body.messages),
        options=options,
        parallel_tool_calls=body.parallel_tool_calls,
    )
    shape_prompt(body, request)
    return request


def complete_request(body: CompletionBody) -> inference_pb2.CompleteRequest:
    """Raises RempartError INVALID_REQUEST for what cannot be said in a CompleteRequest."""
    options = _options(body)
    if body.logprobs is not None:
        options.sampling.logprobs = body.logprobs
        if body.echo:
            raise invalid_request("'logprobs' of an echoed prompt are not supported.", "logprobs")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid_request("'best_of' other than 'n' is not supported.", "best_of")
    request = inference_pb2.CompleteRequest(model=body.model, options=options, echo=bool(body.echo))
    _set_prompt(request, body.prompt)
    return request


def tokenize_request(body: TokenizeBody) -> inference_pb2.TokenizeRequest:
    """Raises RempartError INVALID_REQUEST unless there is either a prompt or messages."""
    if (body.prompt is None) == (body.messages is None):
        raise invalid_request("Either 'prompt' or 'messages' is required.", "prompt")
    if body.messages == []:
        raise invalid_request("'messages' must hold at least one message.", "messages")
    messages = chat_messages(body.messages or [])
    request = inference_pb2.TokenizeRequest(
        model=body.model,
        text=body.prompt or "",
        messages=messages,
        prompt_cache_key=body.prompt_cache_key,
        user=body.user,
    )
    shape_prompt(body, request)
    return request


def _options(body: GenerationBody) -> inference_pb2.GenerationOptions:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return inference_pb2.GenerationOptions(
        sampling=sampling_pb2.SamplingParams(
            temperature=body.temperature,
            top_k=None if body.top_k is None else max(body.top_k, 0),  # -1 is vLLM's word for all
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias,
            allowed_token_ids=body.allowed_token_ids,
            seed=None if body.seed is None else body.seed % 2**64,
            min_tokens=body.min_tokens,
            max_tokens=body.max_tokens,
            n=body.n,
            stop_token_ids=body.stop_token_ids,
            ignore_eos=body.ignore_eos,
        ),
        stop=stop,
        include_stop=bool(body.include_stop_str_in_output),
        prompt_cache_key=body.prompt_cache_key or "",
        user=body.user or "",
        service_tier=_service_tier(body.service_tier),
    )


def _service_tier(name: str | None) -> inference_pb2.ServiceTier:
    if name is None:
        return inference_pb2.SERVICE_TIER_UNSPECIFIED
    if name not in _TIERS:
        raise invalid_request(f"'service_tier' must be one of {', '.join(map(repr, _TIERS))}.", "service_tier")
    return _TIERS[name]


def _set_prompt(request: inference_pb2.CompleteRequest, prompt: str | list[str | int | list[int]]) -> None:
    token_ids = [item for item in prompt if isinstance(item, int)]
    if not isinstance(prompt, str) and prompt and len(token_ids) == len(prompt):
        request.token_ids.ids.extend(token_ids)
        return
    match prompt:
        case str(text) | [str(text)]:
            request.text = text
        case [list(ids)]:
            request.token_ids.ids.extend(ids)
        case _:
            message = "'prompt' must be one text or one list of token ids; send several prompts as several requests."
            raise invalid_request(message, "prompt")
