"""What is recorded of a request and of an admin act: who, what and when; never a word of a prompt or an output."""

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from rempart_platform.request_trace import RequestTrace

MAX_TEXT_CHARS = 63
_MAX_ITEMS = 64
_SECRET_FIELDS = frozenset({"key", "secret", "password", "token"})


def request_fields(trace: RequestTrace) -> dict[str, object]:
    """Copied, for a trace holds its prompt. Labels that a client chose are left out, for they may be anything."""
    request, usage = trace.request, trace.usage
    return {
        "request_id": request.request_id,
        "tenant": request.caller.tenant,
        "key_id": request.caller.key_id,
        "model": request.model,
        "tier": request.service_tier.name.lower(),
        "num_choices": request.num_choices,
        "max_tokens": request.sampling.max_tokens,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "outcome": trace.outcome,
        "finish_reasons": tuple(trace.finish_reasons),
        "endpoints": tuple(trace.endpoints),
        "queue_s": _since(trace.dispatched_s, trace.started_s),
        "ttft_s": _since(trace.first_delta_s, trace.started_s),
        "e2e_s": _since(trace.ended_s, trace.started_s),
    }


def message_fields(message: Message) -> object:
    """What an operator asked for, as JSON; secrets are hidden, and what is long is cut."""
    return _shown(MessageToDict(message, preserving_proto_field_name=True))


def cut(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """A record is no place for a megabyte."""
    return text[:max_chars]


def _since(end_s: float | None, start_s: float) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)


def _shown(value: object) -> object:
    match value:
        case dict():
            return {name: "hidden" if name in _SECRET_FIELDS else _shown(each) for name, each in value.items()}
        case list():
            return [_shown(each) for each in value[:_MAX_ITEMS]]
        case str():
            return cut(value)
        case _:
            return value
