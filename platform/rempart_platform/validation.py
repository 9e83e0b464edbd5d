"""The one way from a client's message to a `GenerationRequest`, for gRPC and HTTP alike.

Cheap checks come first, tokenization last and off the event loop when the text is long; behind this module nothing
checks a request again.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rempart_platform.chat.format import ChatFormat
from rempart_platform.chat.message import Conversation
from rempart_platform.conversation_rules import ConversationMessage, check_conversation_size, to_conversation
from rempart_platform.errors import ErrorKind, RempartError, invalid_request
from rempart_platform.generation import Caller, GenerationRequest, ServiceTier, Standing
from rempart_platform.models import ServedModel
from rempart_platform.request_limits import RequestLimits, require_at_most
from rempart_platform.sampling_rules import check_sampling, require_in_vocabulary
from rempart_platform.text.tokenizer import run_sized
from rempart_protos.v1 import inference_pb2, sampling_pb2

_MAX_CLIENT_LABEL_CHARS = 64
_SERVICE_TIERS = frozenset(inference_pb2.ServiceTier.values())
_NO_CONVERSATION = ("model", "text", "prompt_cache_key", "user")

_Labelled: TypeAlias = inference_pb2.GenerationOptions | inference_pb2.TokenizeRequest


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a front end knows of a request beside its message.

    `seed` is drawn at random for requests that name none; `timeout_s` is how long the caller will wait, if it said so;
    `client_request_id` is what the caller calls the request, as `client_label` leaves it.
    """

    request_id: str
    caller: Caller
    created_s: int
    seed: int
    timeout_s: float | None = None
    client_request_id: str = ""

    def session(self, options: inference_pb2.GenerationOptions) -> str:
        """That of a request that may say nothing of it: then it is its own."""
        return session_of(self.caller, options) or f"{self.caller.tenant} {self.request_id}"


def session_of(caller: Caller, labelled: _Labelled) -> str | None:
    """What requests of one conversation have in common, where they say so: an alias gives them one model."""
    label = labelled.prompt_cache_key or labelled.user
    return f"{caller.tenant} {label}" if label else None


def mint_request_id() -> str:
    """128 random bits: no client can guess or choose another's."""
    return secrets.token_hex(16)


def client_label(said: str | None) -> str:
    """What a client, or a proxy before it, calls its request: printable, cut to what a line of log has room for.

    A label and nothing more: nobody finds, ends or charges a request by it.
    """
    return "".join(character for character in said or "" if character.isprintable())[:_MAX_CLIENT_LABEL_CHARS]


def mint_seed() -> int:
    """A seed for a request that names none; 63 bits, so that every client can send it back."""
    return secrets.randbits(63)


async def chat(
    request: inference_pb2.ChatRequest,
    model: ServedModel,
    limits: RequestLimits,
    arrival: Arrival,
    *,
    is_whole: bool = False,
) -> GenerationRequest:
    """A valid request for the conversation. Raises RempartError naming the field at fault."""
    _check_options(request.options, model, limits)
    conversation, prompt = await _render(request, model, limits)
    said = _Said(prompt, "messages", is_whole, conversation, _max_tool_calls(request))
    return _admissible(said, request.options, model, limits, arrival)


async def complete(
    request: inference_pb2.CompleteRequest,
    model: ServedModel,
    limits: RequestLimits,
    arrival: Arrival,
    *,
    is_whole: bool = False,
) -> GenerationRequest:
    """A valid request for the text or the token ids. Raises RempartError naming the field at fault."""
    _check_options(request.options, model, limits)
    match request.WhichOneof("prompt"):
        case "text":
            prompt = await _encode(request.text, model, limits, param="prompt")
        case "token_ids":
            prompt = list(request.token_ids.ids)
            if len(prompt) < model.max_model_len:  # else refused below, for its length
                _check_prompt_ids(prompt, model)
        case _:
            raise invalid_request("'prompt' is required.", "prompt")
    return _admissible(_Said(prompt, "prompt", is_whole), request.options, model, limits, arrival)


async def tokenize(request: inference_pb2.TokenizeRequest, model: ServedModel, limits: RequestLimits) -> list[int]:
    """Token ids as `chat` (with any part of a conversation) or `complete` (without) would send. Raises RempartError.

    `model` is that of the request's session, as theirs is; see `session_of`.
    """
    _check_labels(request, limits)
    if any(field.name not in _NO_CONVERSATION for field, _ in request.ListFields()):
        _, prompt = await _render(request, model, limits)
        return prompt
    return await _encode(request.text, model, limits, param="text")


async def _encode(text: str, model: ServedModel, limits: RequestLimits, param: str) -> list[int]:
    require_at_most(len(text), limits, "max_prompt_chars", param, unit="characters")
    return await run_sized(len(text), lambda: model.tokenizer.encode(text, add_special=True))


async def _render(
    request: ConversationMessage, model: ServedModel, limits: RequestLimits
) -> tuple[Conversation, list[int]]:
    chat_format = _chat_format(model)
    num_chars = check_conversation_size(request, limits)

    def read_and_render() -> tuple[Conversation, list[int]]:
        conversation = to_conversation(request, limits)
        return conversation, chat_format.render(conversation)

    return await run_sized(num_chars, read_and_render)


def _max_tool_calls(request: inference_pb2.ChatRequest) -> int | None:
    is_single = request.HasField("parallel_tool_calls") and not request.parallel_tool_calls
    return 1 if is_single else None


def _chat_format(model: ServedModel) -> ChatFormat:
    if model.chat_format is None:
        message = f"The model `{model.name}` has no chat format that is supported; use completions."
        raise invalid_request(message, "model")
    return model.chat_format


def _check_options(options: inference_pb2.GenerationOptions, model: ServedModel, limits: RequestLimits) -> None:
    check_sampling(options.sampling, model.vocab_size, limits)
    require_at_most(len(options.stop), limits, "max_stop_strings", "stop", unit="strings")
    for stop in options.stop:
        require_at_most(len(stop), limits, "max_stop_chars", "stop", unit="characters in one string")
        if not stop:
            raise invalid_request("'stop' holds an empty string.", "stop")
    if options.service_tier not in _SERVICE_TIERS:
        raise invalid_request("'service_tier' must be one of the enum's values.", "service_tier")
    _check_labels(options, limits)


def _check_labels(labelled: _Labelled, limits: RequestLimits) -> None:
    for param in ("prompt_cache_key", "user"):
        require_at_most(len(getattr(labelled, param)), limits, "max_label_chars", param, unit="characters")


def _check_prompt_ids(prompt: Sequence[int], model: ServedModel) -> None:
    if prompt:
        require_in_vocabulary(max(prompt), model.vocab_size, "prompt")


@dataclass(frozen=True, slots=True)
class _Said:
    """What a message says beside its options: the prompt, and the parameter that it came in."""

    prompt: list[int]
    param: str
    is_whole: bool
    conversation: Conversation | None = None
    max_tool_calls: int | None = None


def _admissible(
    said: _Said,
    options: inference_pb2.GenerationOptions,
    model: ServedModel,
    limits: RequestLimits,
    arrival: Arrival,
) -> GenerationRequest:
    if not said.prompt:
        raise invalid_request(f"'{said.param}' must hold at least one token.", said.param)
    sampling = sampling_pb2.SamplingParams()
    sampling.CopyFrom(options.sampling)
    sampling.max_tokens = _max_tokens(len(said.prompt), said.param, sampling, model, limits)
    if not sampling.HasField("seed"):
        sampling.seed = arrival.seed
    if sampling.min_tokens > sampling.max_tokens:
        message = f"'min_tokens' is {sampling.min_tokens}, above 'max_tokens', which is {sampling.max_tokens}."
        raise invalid_request(message, "min_tokens")
    return GenerationRequest(
        request_id=arrival.request_id,
        client_request_id=arrival.client_request_id,
        caller=arrival.caller,
        model=model.name,
        prompt_token_ids=tuple(said.prompt),
        sampling=sampling,
        stop=tuple(options.stop),
        include_stop=options.include_stop,
        prompt_cache_key=options.prompt_cache_key,
        user=options.user,
        created_s=arrival.created_s,
        timeout_s=None if arrival.timeout_s is None else min(arrival.timeout_s, limits.max_request_s),
        conversation=said.conversation,
        service_tier=_service_tier(options.service_tier, arrival.caller.standing),
        max_tool_calls=said.max_tool_calls,
        is_whole=said.is_whole,
    )


def _service_tier(asked: inference_pb2.ServiceTier, standing: Standing) -> ServiceTier:
    """What was asked for, but no higher than the caller may: the lower tier has the higher number, in the proto too."""
    named = asked != inference_pb2.SERVICE_TIER_UNSPECIFIED
    return max(ServiceTier(asked) if named else ServiceTier.DEFAULT, standing.max_tier)


def _max_tokens(
    num_prompt: int, param: str, sampling: sampling_pb2.SamplingParams, model: ServedModel, limits: RequestLimits
) -> int:
    """Output tokens that are asked for, or what is left of the context up to the default."""
    maximum = f"This model's maximum context length is {model.max_model_len} tokens. However, "
    left = model.max_model_len - num_prompt
    if left < 1:
        message = f"{maximum}your {param} resulted in {num_prompt} tokens. Please reduce the length of the {param}."
        raise RempartError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, message, param=param)
    if not sampling.HasField("max_tokens"):
        return max(min(left, limits.default_max_tokens), min(left, sampling.min_tokens))
    if sampling.max_tokens > left:
        message = (
            f"{maximum}you requested {num_prompt + sampling.max_tokens} tokens ({num_prompt} in the {param}, "
            f"{sampling.max_tokens} in the completion). Please reduce the length of the {param} or completion."
        )
        raise RempartError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, message, param=param)
    return sampling.max_tokens
