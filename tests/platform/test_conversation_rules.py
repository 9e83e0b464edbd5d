"""conversation_rules.py: what a client may say in a conversation."""

from dataclasses import replace

import pytest

from rempart_platform.chat.message import Conversation, Message, ResponseSchema, Tool, ToolCall
from rempart_platform.conversation_rules import check_conversation_size, to_conversation
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.request_limits import RequestLimits
from rempart_protos.v1 import inference_pb2

LIMITS = RequestLimits()
USER = inference_pb2.ChatMessage(role="user", content="hi")
DEEP = '{"a":' * 65 + "1" + "}" * 65


def calling(*call_ids: str, arguments: str = "{}") -> inference_pb2.ChatMessage:
    calls = [inference_pb2.ToolCall(id=call_id, name="f", arguments=arguments) for call_id in call_ids]
    return inference_pb2.ChatMessage(role="assistant", tool_calls=calls)


def result(call_id: str) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role="tool", content="r", tool_call_id=call_id)


def tool(name: str = "f", parameters: str = "") -> inference_pb2.Tool:
    return inference_pb2.Tool(name=name, parameters=parameters)


def asking(*messages: inference_pb2.ChatMessage, **fields: object) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(messages=messages or [USER], **fields)  # type: ignore[arg-type] # by name


def read(request: inference_pb2.ChatRequest, limits: RequestLimits) -> Conversation:
    check_conversation_size(request, limits)
    return to_conversation(request, limits)


def refusal(request: inference_pb2.ChatRequest, limits: RequestLimits = LIMITS) -> RempartError:
    with pytest.raises(RempartError) as refused:
        read(request, limits)
    assert refused.value.kind is ErrorKind.INVALID_REQUEST
    return refused.value


def test_everything_that_was_said_is_in_the_conversation() -> None:
    request = asking(
        inference_pb2.ChatMessage(role="developer", content="be brief", name="x"),
        USER,
        inference_pb2.ChatMessage(
            role="assistant",
            content="c",
            reasoning="r",
            tool_calls=[
                inference_pb2.ToolCall(id="1", name="any name"),
                calling("2", arguments='{"a":[1]}').tool_calls[0],
            ],
        ),
        result("2"),
        result("1"),
        tools=[inference_pb2.Tool(name="f", description="d", parameters='{"type": "object"}', strict=True), tool("g")],
        thinking=False,
        response_format=inference_pb2.ResponseFormat(json_schema='{"x": 1}'),
    )
    conversation = to_conversation(request, LIMITS)

    assert conversation.messages == (
        Message("developer", "be brief"),
        Message("user", "hi"),
        Message("assistant", "c", "r", (ToolCall("1", "any name", "{}"), ToolCall("2", "f", '{"a":[1]}'))),
        Message("tool", "r", tool_call_id="2"),
        Message("tool", "r", tool_call_id="1"),
    )
    assert conversation.tools == (Tool("f", "d", '{"type": "object"}', True), Tool("g"))
    assert conversation.thinking is False
    assert conversation.response_schema == ResponseSchema('{"x": 1}')


def test_what_was_not_said_is_left_to_the_model() -> None:
    conversation = to_conversation(asking(), LIMITS)
    assert (conversation.thinking, conversation.response_schema) == (None, None)
    any_object = to_conversation(asking(response_format=inference_pb2.ResponseFormat()), LIMITS)
    assert any_object.response_schema == ResponseSchema("")


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (inference_pb2.ChatRequest(), "messages"),
        (asking(inference_pb2.ChatMessage(role="function")), "messages[0].role"),
        (asking(inference_pb2.ChatMessage(role="user", reasoning="x")), "messages[0].reasoning"),
        (asking(inference_pb2.ChatMessage(role="user", tool_call_id="x")), "messages[0].tool_call_id"),
        (
            asking(inference_pb2.ChatMessage(role="system", tool_calls=[inference_pb2.ToolCall(id="1", name="f")])),
            "messages[0].tool_calls",
        ),
        (asking(calling("")), "messages[0].tool_calls[0].id"),
        (
            asking(inference_pb2.ChatMessage(role="assistant", tool_calls=[inference_pb2.ToolCall(id="1")])),
            "messages[0].tool_calls[0].name",
        ),
        (asking(USER, calling("1", arguments="{")), "messages[1].tool_calls[0].arguments"),
        (asking(USER, calling("1", arguments="[]")), "messages[1].tool_calls[0].arguments"),
        (asking(USER, calling("1", arguments="{} x")), "messages[1].tool_calls[0].arguments"),
        (asking(USER, calling("1", arguments=DEEP)), "messages[1].tool_calls[0].arguments"),
        (asking(calling("1", "1")), "messages[0].tool_calls"),
        (asking(calling("1"), result("1"), calling("1")), "messages[2].tool_calls"),
        (asking(result("1")), "messages[0].tool_call_id"),
        (asking(result("")), "messages[0].tool_call_id"),
        (asking(result("1"), calling("1")), "messages[0].tool_call_id"),
        (asking(calling("1"), result("1"), result("1")), "messages[2].tool_call_id"),
        (asking(tools=[tool("f"), tool("")]), "tools[1].name"),
        (asking(tools=[tool("a b")]), "tools[0].name"),
        (asking(tools=[tool("f\n")]), "tools[0].name"),
        (asking(tools=[tool("é")]), "tools[0].name"),
        (asking(tools=[tool("f" * 65)]), "tools[0].name"),
        (asking(tools=[tool("f"), tool("f")]), "tools"),
        (asking(tools=[tool(parameters='"object"')]), "tools[0].parameters"),
        (asking(tools=[tool(parameters="{'a': 1}")]), "tools[0].parameters"),
        (asking(tools=[tool(parameters=DEEP)]), "tools[0].parameters"),
        (asking(response_format=inference_pb2.ResponseFormat(json_schema="true")), "response_format"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(request_: inference_pb2.ChatRequest, param: str) -> None:
    error = refusal(request_)
    assert error.param == param
    assert error.message


@pytest.mark.parametrize(
    ("limit", "request_"),
    [
        ("max_messages", asking(*[USER] * 11)),
        ("max_prompt_chars", asking(USER, inference_pb2.ChatMessage(role="assistant", reasoning="x" * 9))),
        ("max_prompt_chars", asking(calling("1", arguments="{}       "))),
        ("max_tools", asking(tools=[tool(f"f{i}") for i in range(11)])),
        ("max_tool_chars", asking(tools=[inference_pb2.Tool(name="f", description="x" * 10)])),
        ("max_tool_chars", asking(tools=[tool(parameters='{"a":"b"}'), tool("g")])),
        ("max_schema_chars", asking(response_format=inference_pb2.ResponseFormat(json_schema="{" + " " * 10))),
        ("max_json_nodes", asking(tools=[tool(parameters='{"a": [' + "1," * 10 + "1]}")])),
        ("max_json_depth", asking(tools=[tool(parameters='{"a":' * 11 + "1" + "}" * 11)])),
    ],
)
def test_every_limit_can_be_set_and_is_named_when_met(limit: str, request_: inference_pb2.ChatRequest) -> None:
    check_conversation_size(request_, LIMITS)
    assert f"(limit {limit})" in refusal(request_, replace(LIMITS, **{limit: 10})).message


def choice(**fields: object) -> inference_pb2.ToolChoice:
    return inference_pb2.ToolChoice(**fields)  # type: ignore[arg-type] # by name


def test_no_tools_are_told_of_when_none_may_be_called() -> None:
    mode = inference_pb2.ToolChoice
    for chosen in (choice(), choice(mode=mode.MODE_AUTO), choice(mode=mode.MODE_UNSPECIFIED)):
        assert to_conversation(asking(tools=[tool()], tool_choice=chosen), LIMITS).tools == (Tool("f"),)
    none = asking(tools=[tool()], tool_choice=choice(mode=mode.MODE_NONE))
    assert to_conversation(none, LIMITS).tools == ()
    assert refusal(asking(tools=[tool("")], tool_choice=choice(mode=mode.MODE_NONE))).param == "tools[0].name"


@pytest.mark.parametrize(
    ("chosen", "tools", "message"),
    [
        (choice(mode=inference_pb2.ToolChoice.MODE_REQUIRED), [tool()], "cannot be forced"),
        (choice(mode=inference_pb2.ToolChoice.MODE_REQUIRED), [], "there are no tools"),
        (choice(function="f"), [tool()], "cannot be forced"),
        (choice(function="g"), [tool()], "not among the tools: 'g'"),
        (choice(mode=99), [tool()], "not known"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(
    chosen: inference_pb2.ToolChoice, tools: list[inference_pb2.Tool], message: str
) -> None:
    error = refusal(asking(tools=tools, tool_choice=chosen))
    assert error.param == "tool_choice"
    assert message in error.message
