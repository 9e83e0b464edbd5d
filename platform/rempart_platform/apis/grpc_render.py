"""Events as `rempart.v1` messages."""

from typing import Final

from rempart_platform import generation
from rempart_platform.generation import Delta, Finished, FinishReason, GenerationEvent, GenerationRequest, ServiceTier
from rempart_protos.v1 import inference_pb2, sampling_pb2

_REASONS: Final = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: sampling_pb2.FINISH_REASON_TOOL_CALLS,
}
_TIERS: Final = {
    ServiceTier.PRIORITY: inference_pb2.SERVICE_TIER_PRIORITY,
    ServiceTier.DEFAULT: inference_pb2.SERVICE_TIER_DEFAULT,
    ServiceTier.FLEX: inference_pb2.SERVICE_TIER_FLEX,
    ServiceTier.BATCH: inference_pb2.SERVICE_TIER_BATCH,
}


def tier_message(service_tier: ServiceTier) -> inference_pb2.ServiceTier:
    """The same, as `rempart.v1` has it."""
    return _TIERS[service_tier]


def admitted(request: GenerationRequest) -> inference_pb2.GenerationEvent:
    """The first element of every stream."""
    return inference_pb2.GenerationEvent(
        admitted=inference_pb2.Admitted(
            request_id=request.request_id,
            model=request.model,
            created_s=request.created_s,
            service_tier=tier_message(request.service_tier),
        )
    )


def render(event: GenerationEvent) -> inference_pb2.GenerationEvent:
    """One element of the stream."""
    match event:
        case Delta():
            delta = inference_pb2.Delta(
                choice=event.choice,
                text=event.text,
                token_ids=event.token_ids,
                logprobs=[_logprob(logprob) for logprob in event.logprobs],
                reasoning=event.reasoning,
                tool_calls=[_tool_call(call) for call in event.tool_calls],
            )
            return inference_pb2.GenerationEvent(delta=delta)
        case Finished():
            finished = inference_pb2.Finished(choice=event.choice, reason=_REASONS[event.reason])
            return inference_pb2.GenerationEvent(finished=finished)
        case generation.Usage():
            usage = inference_pb2.Usage(
                prompt_tokens=event.prompt_tokens,
                completion_tokens=event.completion_tokens,
                cached_tokens=event.cached_tokens,
                reasoning_tokens=event.reasoning_tokens,
            )
            return inference_pb2.GenerationEvent(usage=usage)


def _tool_call(call: generation.ToolCallDelta) -> inference_pb2.ToolCallDelta:
    return inference_pb2.ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=call.arguments)


def _logprob(logprob: generation.TextLogprob) -> inference_pb2.TextLogprob:
    return inference_pb2.TextLogprob(
        token=logprob.token,
        token_bytes=logprob.token_bytes,
        logprob=logprob.logprob,
        top=[_logprob(top) for top in logprob.top],
    )
