from pathlib import Path

import pytest

from rempart_engine.config import EngineConfig
from rempart_engine.core.request import FinishReason, InvalidRequestError, Request, RequestId, SamplingParams
from rempart_engine.core.step import ErrorCode, EventError, TokenEvent, TokenLogprob
from rempart_engine.proto_codec import event_to_proto, num_choices, request_from_proto
from rempart_protos.v1 import engine_pb2, sampling_pb2

CONFIG = EngineConfig(model=Path("m"), max_n=4, max_logprobs=5, max_stop_token_ids=2, max_logit_bias=2)


def _parse(message: engine_pb2.GenerateRequest) -> Request:
    return request_from_proto(message, RequestId("session-1/r"), CONFIG, now=100.0)


def _message(sampling: sampling_pb2.SamplingParams | None = None) -> engine_pb2.GenerateRequest:
    return engine_pb2.GenerateRequest(request_id="r", prompt_token_ids=[1, 2], sampling=sampling)


def test_unset_fields_mean_the_defaults() -> None:
    assert _parse(_message()) == Request(RequestId("session-1/r"), (1, 2), SamplingParams())


def test_a_zero_that_was_sent_is_a_zero_that_was_meant() -> None:
    sampling = _parse(_message(sampling_pb2.SamplingParams(temperature=0, seed=0, logprobs=0))).sampling
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0.0, 0, 0)


def test_every_sampling_field_arrives() -> None:
    message = sampling_pb2.SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={3: 1.5},
        allowed_token_ids=[3, 4],
        seed=2**64 - 1,
        min_tokens=2,
        max_tokens=9,
        n=3,
        logprobs=1,
        prompt_logprobs=2,
        stop_token_ids=[5],
        ignore_eos=True,
    )
    assert {descriptor.name for descriptor, _ in message.ListFields()} == set(message.DESCRIPTOR.fields_by_name)
    assert _parse(_message(message)).sampling == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={3: 1.5},
        allowed_token_ids=(3, 4),
        seed=2**64 - 1,
        min_tokens=2,
        max_tokens=9,
        n=3,
        logprobs=1,
        prompt_logprobs=2,
        stop_token_ids=(5,),
        ignore_eos=True,
    )


def test_a_timeout_becomes_a_deadline_counted_from_receipt() -> None:
    message = _message()
    message.timeout_s = 2.5
    assert _parse(message).deadline == 102.5


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 257}, "request_id"),
        ({"lora_name": "a"}, "lora_name"),
        ({"cache_salt": b"x" * 65}, "cache_salt"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"sampling": sampling_pb2.SamplingParams(n=5)}, "n"),
        ({"sampling": sampling_pb2.SamplingParams(n=0)}, "n"),
        ({"sampling": sampling_pb2.SamplingParams(logprobs=6)}, "logprobs"),
        ({"sampling": sampling_pb2.SamplingParams(prompt_logprobs=6)}, "prompt_logprobs"),
        ({"sampling": sampling_pb2.SamplingParams(stop_token_ids=[1, 2, 3])}, "stop_token_ids"),
        ({"sampling": sampling_pb2.SamplingParams(logit_bias={1: 0, 2: 0, 3: 0})}, "logit_bias"),
        ({"sampling": sampling_pb2.SamplingParams(allowed_token_ids=range(5000))}, "allowed_token_ids"),
        ({"sampling": sampling_pb2.SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"sampling": sampling_pb2.SamplingParams(logit_bias={1: 1000})}, "logit_bias"),
    ],
)
def test_a_broken_limit_is_named(broken: dict[str, object], named: str) -> None:
    message = engine_pb2.GenerateRequest(**{"request_id": "r", "prompt_token_ids": [1], **broken})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=named):
        _parse(message)


@pytest.mark.parametrize(("asked", "told"), [(None, 1), (0, 1), (3, 3), (2**32 - 1, 4)])
def test_an_answer_to_all_choices_is_bounded(asked: int | None, told: int) -> None:
    assert num_choices(_message(sampling_pb2.SamplingParams(n=asked)), CONFIG.max_n) == told


def test_an_event_goes_out_whole_under_its_callers_id() -> None:
    logprob = TokenLogprob(-0.5, (7, 8), (-0.5, -1.0))
    event = TokenEvent(RequestId("session-1/r"), 1, 4, (7,), (logprob,), FinishReason.LENGTH, 64, (logprob, logprob))
    message = event_to_proto(event, "r")
    proto_logprob = sampling_pb2.TokenLogprob(logprob=-0.5, top_token_ids=[7, 8], top_logprobs=[-0.5, -1.0])
    assert message == engine_pb2.TokenEvent(
        request_id="r",
        choice=1,
        index=4,
        token_ids=[7],
        logprobs=[proto_logprob],
        finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
        num_cached_tokens=64,
        prompt_logprobs=[proto_logprob, proto_logprob],
    )
    assert not message.HasField("error")


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_code_has_its_name_in_the_proto(code: ErrorCode) -> None:
    message = event_to_proto(TokenEvent(RequestId("r"), 0, 0, error=EventError(code, "why")), "r")
    assert engine_pb2.EngineError.Code.Name(message.error.code) == f"CODE_{code.value}"


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_its_name_in_the_proto(reason: FinishReason) -> None:
    message = event_to_proto(TokenEvent(RequestId("r"), 0, 0, finish_reason=reason), "r")
    assert sampling_pb2.FinishReason.Name(message.finish_reason) == f"FINISH_REASON_{reason.name}"
