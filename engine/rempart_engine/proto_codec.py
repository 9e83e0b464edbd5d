"""Between the messages of `rempart.v1` and the engine core's own values.

What comes in is checked here against this process's limits; what depends on the model, the scheduler checks.
"""

import math

from rempart_engine.config import BLOCK_SIZE, EngineConfig
from rempart_engine.core.load import Load
from rempart_engine.core.request import FinishReason, InvalidRequestError, Request, RequestId, SamplingParams
from rempart_engine.core.step import ErrorCode, EventError, TokenEvent, TokenLogprob
from rempart_engine.ipc import Ready
from rempart_protos.v1 import engine_pb2, sampling_pb2

_MAX_REQUEST_ID_CHARS = 256
_MAX_CACHE_SALT_BYTES = 64

_OPTIONAL_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "max_tokens",
    "n",
    "logprobs",
    "prompt_logprobs",
    "ignore_eos",
)

_FINISH_REASONS = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: sampling_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: sampling_pb2.FINISH_REASON_ERROR,
}
_ERROR_CODES = {code: f"CODE_{code.value}" for code in ErrorCode}


def request_from_proto(
    message: engine_pb2.GenerateRequest, core_id: RequestId, config: EngineConfig, now: float
) -> Request:
    """The request under the id that the core shall know it by; `now` is its receipt on the core's clock.

    Raises:
        InvalidRequestError: it breaks a limit, which the message names.
    """
    _require_at_most("characters of request_id", len(message.request_id), _MAX_REQUEST_ID_CHARS)
    if not message.request_id:
        raise InvalidRequestError("request_id is empty")
    if message.lora_name:
        raise InvalidRequestError("lora_name is reserved and must be empty")
    _require_at_most("bytes of cache_salt", len(message.cache_salt), _MAX_CACHE_SALT_BYTES)
    return Request(
        request_id=core_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=_sampling_from_proto(message.sampling, config),
        priority=message.priority,
        deadline=now + _timeout_s(message) if message.HasField("timeout_s") else None,
        cache_salt=message.cache_salt,
        num_emitted_tokens=message.num_emitted_tokens,
    )


def num_choices(message: engine_pb2.GenerateRequest, max_n: int) -> int:
    """How many choices a caller waits for, also when the request is not valid."""
    asked = message.sampling.n if message.sampling.HasField("n") else 1
    return min(max(asked, 1), max_n)


def _timeout_s(message: engine_pb2.GenerateRequest) -> float:
    if not (message.timeout_s > 0 and math.isfinite(message.timeout_s)):
        raise InvalidRequestError(f"timeout_s must be positive and finite, got {message.timeout_s:g}")
    return message.timeout_s


def _sampling_from_proto(message: sampling_pb2.SamplingParams, config: EngineConfig) -> SamplingParams:
    _require_at_most("n", message.n, config.max_n)
    _require_at_most("logprobs", message.logprobs, config.max_logprobs)
    _require_at_most("prompt_logprobs", message.prompt_logprobs, config.max_logprobs)
    _require_at_most("entries of logit_bias", len(message.logit_bias), config.max_logit_bias)
    _require_at_most("allowed_token_ids", len(message.allowed_token_ids), config.max_allowed_token_ids)
    _require_at_most("stop_token_ids", len(message.stop_token_ids), config.max_stop_token_ids)
    present = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING_FIELDS if message.HasField(name)}
    return SamplingParams(
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
        **present,
    )


def _require_at_most(what: str, number: int, most: int) -> None:
    if number > most:
        raise InvalidRequestError(f"at most {most} {what}, got {number}")


def event_to_proto(event: TokenEvent, caller_id: str) -> engine_pb2.TokenEvent:
    """The event under the id that its caller gave the request."""
    message = engine_pb2.TokenEvent(
        request_id=caller_id, choice=event.choice, index=event.index, token_ids=event.token_ids
    )
    if event.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[event.finish_reason]
    if event.num_cached_tokens:
        message.num_cached_tokens = event.num_cached_tokens
    if event.logprobs:
        message.logprobs.extend(map(_logprob_to_proto, event.logprobs))
    if event.prompt_logprobs:
        message.prompt_logprobs.extend(map(_logprob_to_proto, event.prompt_logprobs))
    if event.error is not None:
        message.error.CopyFrom(error_to_proto(event.error))
    return message


def error_to_proto(error: EventError) -> engine_pb2.EngineError:
    return engine_pb2.EngineError(code=_ERROR_CODES[error.code], message=error.message)


def _logprob_to_proto(logprob: TokenLogprob) -> sampling_pb2.TokenLogprob:
    return sampling_pb2.TokenLogprob(
        logprob=logprob.logprob, top_token_ids=logprob.top_token_ids, top_logprobs=logprob.top_logprobs
    )


def load_to_proto(load: Load, *, draining: bool) -> engine_pb2.EngineLoad:
    return engine_pb2.EngineLoad(
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_waiting_tokens=load.num_waiting_tokens,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        num_steps=load.num_steps,
        draining=draining,
    )


def model_info_to_proto(model: Ready, engine_version: str) -> engine_pb2.ModelInfo:
    return engine_pb2.ModelInfo(
        model_name=model.model_name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        block_size=BLOCK_SIZE,
        num_blocks=model.num_blocks,
        engine_version=engine_version,
        dtype=model.dtype,
        max_num_rows=model.max_num_rows,
    )
