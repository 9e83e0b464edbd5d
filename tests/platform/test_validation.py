"""validation.py, sampling_rules.py and request_limits.py"""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform import validation
from rempart_platform.apis.testing import CALLER, tiny_model
from rempart_platform.chat.message import Conversation, Message
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import GenerationRequest, ServiceTier, Standing
from rempart_platform.models import ModelCatalog, ServedModel
from rempart_platform.request_limits import RequestLimits
from rempart_platform.validation import Arrival
from rempart_protos.v1 import inference_pb2, sampling_pb2

LIMITS = RequestLimits()
ARRIVAL = Arrival(request_id="r1", caller=CALLER, created_s=5, seed=99, timeout_s=12.0)
MODEL = tiny_model()


async def complete(
    prompt: str | list[int] = "hi",
    *,
    model: ServedModel = MODEL,
    limits: RequestLimits = LIMITS,
    arrival: Arrival = ARRIVAL,
    options: inference_pb2.GenerationOptions | None = None,
    **sampling: object,
) -> GenerationRequest:
    message = inference_pb2.CompleteRequest(model=model.name, options=options)
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    message.options.sampling.MergeFrom(sampling_pb2.SamplingParams(**sampling))  # type: ignore[arg-type] # by name
    return await validation.complete(message, model, limits, arrival)


async def chat(
    *messages: tuple[str, str], model: ServedModel = MODEL, limits: RequestLimits = LIMITS, **sampling: object
) -> GenerationRequest:
    message = inference_pb2.ChatRequest(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )
    message.options.sampling.MergeFrom(sampling_pb2.SamplingParams(**sampling))  # type: ignore[arg-type] # by name
    return await validation.chat(message, model, limits, ARRIVAL)


async def test_a_valid_request_is_complete() -> None:
    request = await complete("hi", temperature=0.0, n=2)

    assert request.prompt_token_ids == tuple(b"hi")
    assert request.sampling.max_tokens == MODEL.max_model_len - 2
    assert request.sampling.seed == 99
    assert request.sampling.temperature == 0.0
    assert request.num_choices == 2
    assert (request.request_id, request.created_s, request.timeout_s) == ("r1", 5, 12.0)


@pytest.mark.parametrize(
    ("max_tier", "asked", "used"),
    [
        (ServiceTier.DEFAULT, inference_pb2.SERVICE_TIER_UNSPECIFIED, ServiceTier.DEFAULT),
        (ServiceTier.DEFAULT, inference_pb2.SERVICE_TIER_PRIORITY, ServiceTier.DEFAULT),
        (ServiceTier.DEFAULT, inference_pb2.SERVICE_TIER_BATCH, ServiceTier.BATCH),
        (ServiceTier.PRIORITY, inference_pb2.SERVICE_TIER_UNSPECIFIED, ServiceTier.DEFAULT),
        (ServiceTier.PRIORITY, inference_pb2.SERVICE_TIER_PRIORITY, ServiceTier.PRIORITY),
        (ServiceTier.FLEX, inference_pb2.SERVICE_TIER_UNSPECIFIED, ServiceTier.FLEX),
        (ServiceTier.FLEX, inference_pb2.SERVICE_TIER_DEFAULT, ServiceTier.FLEX),
    ],
)
async def test_a_tier_is_used_as_far_as_the_tenant_may(
    max_tier: ServiceTier, asked: inference_pb2.ServiceTier, used: ServiceTier
) -> None:
    arrival = replace(ARRIVAL, caller=replace(CALLER, standing=Standing(max_tier=max_tier)))
    options = inference_pb2.GenerationOptions(service_tier=asked)
    assert (await complete(options=options, arrival=arrival)).service_tier is used


async def test_a_tier_that_there_is_not_is_refused() -> None:
    options = inference_pb2.GenerationOptions()
    options.ParseFromString(b"\x30\x63")  # field 6 = 99, which no client of today's protos could say
    with pytest.raises(RempartError) as raised:
        await complete(options=options)
    assert raised.value.param == "service_tier"


def test_the_protos_number_tiers_as_the_queue_does() -> None:
    assert {f"SERVICE_TIER_{tier.name}": tier.value for tier in ServiceTier} == {
        name: number for name, number in inference_pb2.ServiceTier.items() if number
    }


async def test_defaults_and_deadlines_are_bounded() -> None:
    limits = replace(LIMITS, default_max_tokens=7, max_request_s=10.0)

    assert (await complete(limits=limits)).sampling.max_tokens == 7
    assert (await complete(limits=limits, min_tokens=9)).sampling.max_tokens == 9
    assert (await complete(limits=limits)).timeout_s == 10.0
    assert (await complete(arrival=replace(ARRIVAL, timeout_s=None))).timeout_s is None
    assert (await complete(seed=0)).sampling.seed == 0


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 11.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", -2.5),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("n", 0),
        ("n", 17),
        ("n", 2**32 - 1),
        ("max_tokens", 0),
        ("min_tokens", 2**32 - 1),
        ("logprobs", 21),
        ("prompt_logprobs", 1),
        ("stop_token_ids", [258]),
        ("stop_token_ids", [1] * 65),
        ("allowed_token_ids", [2**32 - 1]),
        ("allowed_token_ids", [1] * 1025),
        ("logit_bias", {258: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
async def test_a_number_out_of_range_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(RempartError) as refused:
        await complete(**{param: value})  # type: ignore[arg-type] # sampling fields by name

    assert refused.value.kind is ErrorKind.INVALID_REQUEST
    assert refused.value.param == param
    assert param in refused.value.message


async def test_a_bound_that_nobody_reaches_is_not_told() -> None:
    with pytest.raises(RempartError, match=r"^'n' is 0; it must be at least 1\.$"):
        await complete(n=0)
    with pytest.raises(RempartError, match=r"^'top_p' is 0; it must be in \(0, 1\]\.$"):
        await complete(top_p=0.0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 1.0},
        {"repetition_penalty": 10.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"n": 16, "logprobs": 20, "max_tokens": 510, "min_tokens": 510},
        {"logit_bias": {257: -100.0}, "allowed_token_ids": [0, 257], "stop_token_ids": [257]},
    ],
)
async def test_numbers_at_the_edge_of_their_range_pass(sampling: dict[str, object]) -> None:
    request = await complete(**sampling)  # type: ignore[arg-type] # sampling fields by name
    assert request.sampling.seed == 99


@given(st.floats(width=32))
async def test_no_temperature_outside_of_its_range_ever_passes(value: float) -> None:
    if 0 <= value <= 100:
        await complete(temperature=value)
    else:
        with pytest.raises(RempartError, match="temperature"):
            await complete(temperature=value)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"user": "u" * 65}, "user"),
        ({"prompt_cache_key": "k" * 65}, "prompt_cache_key"),
    ],
)
async def test_an_option_too_large_is_refused_by_name(options: dict[str, object], param: str) -> None:
    with pytest.raises(RempartError) as refused:
        await complete(options=inference_pb2.GenerationOptions(**options))  # type: ignore[arg-type] # by name
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("limit", "ask"),
    [
        ("max_prompt_chars", {"prompt": "x" * 11}),
        ("max_n", {"n": 11}),
        ("max_logprobs", {"logprobs": 11}),
        ("max_stop_token_ids", {"stop_token_ids": range(11)}),
        ("max_logit_bias", {"logit_bias": dict.fromkeys(range(11), 1.0)}),
        ("max_allowed_token_ids", {"allowed_token_ids": range(11)}),
        ("max_stop_strings", {"options": inference_pb2.GenerationOptions(stop=["x"] * 11)}),
        ("max_stop_chars", {"options": inference_pb2.GenerationOptions(stop=["x" * 11])}),
        ("max_label_chars", {"options": inference_pb2.GenerationOptions(user="x" * 11)}),
    ],
)
async def test_every_limit_can_be_set_and_is_named_when_met(limit: str, ask: dict[str, object]) -> None:
    limits = replace(LIMITS, **{limit: 10})
    with pytest.raises(RempartError, match=f"limit {limit}"):
        await complete(limits=limits, **ask)  # type: ignore[arg-type] # by name


async def test_a_prompt_too_long_is_told_the_numbers() -> None:
    with pytest.raises(RempartError) as refused:
        await complete("x" * 512)
    assert refused.value.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED
    assert refused.value.message.startswith("This model's maximum context length is 512 tokens. However, ")
    assert "512 tokens" in refused.value.message

    with pytest.raises(RempartError, match=r"you requested 522 tokens \(500 in the prompt, 22 in the completion\)"):
        await complete("x" * 500, max_tokens=22)
    with pytest.raises(RempartError, match="context length"):
        await complete([300] * 512)
    assert (await complete("x" * 500, max_tokens=12)).worst_case_tokens == 512


async def test_prompts_of_token_ids_are_taken_as_they_are() -> None:
    assert (await complete([257, 0])).prompt_token_ids == (257, 0)
    with pytest.raises(RempartError, match="token id 258"):
        await complete([1, 258])
    empties: tuple[str | list[int], ...] = ([], "")
    for empty in empties:
        with pytest.raises(RempartError) as refused:
            await complete(empty)
        assert refused.value.param == "prompt"


async def test_chat_needs_messages_roles_and_a_format() -> None:
    valid = await chat(("developer", "d"), ("user", "u"))
    assert valid.prompt_token_ids[1:7] == tuple(b"system")
    assert valid.conversation == Conversation((Message("developer", "d"), Message("user", "u")))
    assert (await complete()).conversation is None
    for messages, param in (
        ((), "messages"),
        ((("tool", "x"),), "messages[0].tool_call_id"),
        ((("user", "x"), ("", "y")), "messages[1].role"),
        ((("user", "x"),) * 1025, "messages"),
    ):
        with pytest.raises(RempartError) as refused:
            await chat(*messages)
        assert (refused.value.kind, refused.value.param) == (ErrorKind.INVALID_REQUEST, param)
    with pytest.raises(RempartError, match="use completions"):
        await chat(("user", "x"), model=tiny_model(has_chat=False))
    with pytest.raises(RempartError, match="limit max_prompt_chars"):
        await chat(("user", "x" * 6), ("user", "x" * 5), limits=replace(LIMITS, max_prompt_chars=10))
    with pytest.raises(RempartError, match="min_tokens"):
        await chat(("user", "x"), max_tokens=1, min_tokens=2)


async def test_tokenize_gives_what_would_be_sent() -> None:
    messages = [inference_pb2.ChatMessage(role="user", content="hi")]
    tokenized = await validation.tokenize(inference_pb2.TokenizeRequest(messages=messages), MODEL, LIMITS)
    assert tuple(tokenized) == (await chat(("user", "hi"))).prompt_token_ids
    assert await validation.tokenize(inference_pb2.TokenizeRequest(text="hi"), MODEL, LIMITS) == list(b"hi")


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(RempartError) as refused:
        ModelCatalog([MODEL]).get("gpt-9")
    assert refused.value.kind is ErrorKind.MODEL_NOT_FOUND
    assert refused.value.param == "model"


def test_minted_ids_are_long_and_never_the_same() -> None:
    ids = {validation.mint_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(request_id) for request_id in ids} == {32}
    assert all(0 <= validation.mint_seed() < 2**63 for _ in range(100))
