"""How an OpenAI client says a conversation: messages, tools, thinking, response format; the same as `rempart.v1`.

Thinking is chosen by `chat_template_kwargs`, in the words of DeepSeek's template or of Qwen's, or by
`reasoning_effort`. A response format is told to the model in its prompt; the output is not forced to follow it, not
even by `strict`.
"""

from collections.abc import Iterable
from typing import Protocol

import msgspec

from rempart_platform.errors import invalid_request
from rempart_protos.v1 import inference_pb2

_NULL = msgspec.Raw(b"null")
_NO_EFFORT = "none"
_EFFORTS = (_NO_EFFORT, "minimal", "low", "medium", "high", "xhigh", "max")
_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str | None = None


class ToolCallBody(msgspec.Struct):
    id: str
    function: CalledFunction
    type: str = "function"


class MessageBody(msgspec.Struct):
    """Reasoning is read under both names that servers give it, so an answer can be sent back as it came."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionBody(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: msgspec.Raw = _NULL
    strict: bool | None = None


class ToolBody(msgspec.Struct):
    type: str
    function: FunctionBody | None = None


class ChosenFunction(msgspec.Struct):
    name: str


class ToolChoiceBody(msgspec.Struct):
    type: str
    function: ChosenFunction | None = None


class JsonSchemaBody(msgspec.Struct):
    schema: msgspec.Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormatBody(msgspec.Struct):
    type: str
    json_schema: JsonSchemaBody | None = None


class TemplateKwargs(msgspec.Struct, forbid_unknown_fields=True):
    thinking: bool | None = None
    enable_thinking: bool | None = None


class PromptShape(Protocol):
    """The fields beside the messages that change the prompt."""

    tools: list[ToolBody] | None
    tool_choice: str | ToolChoiceBody | None
    response_format: ResponseFormatBody | None
    reasoning_effort: str | None
    chat_template_kwargs: TemplateKwargs | None


def chat_messages(bodies: list[MessageBody]) -> list[inference_pb2.ChatMessage]:
    """Raises RempartError INVALID_REQUEST for content that is no text."""
    return [_message(body, f"messages[{position}]") for position, body in enumerate(bodies)]


def shape_prompt(body: PromptShape, request: inference_pb2.ChatRequest | inference_pb2.TokenizeRequest) -> None:
    """Says in `request` what `body` says. Raises RempartError INVALID_REQUEST for what cannot be said."""
    request.tools.extend(_tool(tool, f"tools[{position}]") for position, tool in enumerate(body.tools or ()))
    if body.tool_choice is not None:
        request.tool_choice.CopyFrom(_tool_choice(body.tool_choice))
    thinking = _thinking(body)
    if thinking is not None:
        request.thinking = thinking
    response_format = _response_format(body.response_format)
    if response_format is not None:
        request.response_format.CopyFrom(response_format)


def _message(body: MessageBody, param: str) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(
        role=body.role,
        content=_text(body, f"{param}.content"),
        name=body.name or "",
        reasoning=body.reasoning_content or body.reasoning or "",
        tool_calls=[_tool_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(body.tool_calls or ())],
        tool_call_id=body.tool_call_id or "",
    )


def _text(body: MessageBody, param: str) -> str:
    match body.content:
        case str(text):
            return text
        case list(parts):
            for part in parts:
                if part.type != "text" or part.text is None:
                    raise invalid_request(f"Content of type '{part.type[:32]}' is not supported.", param)
            return "".join(part.text or "" for part in parts)
        case None:
            if body.tool_calls:
                return ""
            raise invalid_request(f"'{param}' must be a text.", param)


def _tool_call(body: ToolCallBody, param: str) -> inference_pb2.ToolCall:
    _require_function(body.type, f"{param}.type")
    return inference_pb2.ToolCall(id=body.id, name=body.function.name, arguments=body.function.arguments or "")


def _tool(body: ToolBody, param: str) -> inference_pb2.Tool:
    _require_function(body.type, f"{param}.type")
    function = body.function
    if function is None:
        raise invalid_request(f"'{param}.function' is required.", f"{param}.function")
    return inference_pb2.Tool(
        name=function.name,
        description=function.description or "",
        parameters=_json_text(function.parameters, f"{param}.function.parameters"),
        strict=bool(function.strict),
    )


def _tool_choice(body: str | ToolChoiceBody) -> inference_pb2.ToolChoice:
    if isinstance(body, str):
        if body not in _MODES:
            raise invalid_request(f"'tool_choice' must be one of {_listed(_MODES)}, or name a function.", "tool_choice")
        return inference_pb2.ToolChoice(mode=_MODES[body])
    _require_function(body.type, "tool_choice.type")
    if body.function is None:
        raise invalid_request("'tool_choice.function' is required.", "tool_choice.function")
    return inference_pb2.ToolChoice(function=body.function.name)


def _thinking(body: PromptShape) -> bool | None:
    kwargs = body.chat_template_kwargs or TemplateKwargs()
    effort = body.reasoning_effort
    if effort is not None and effort not in _EFFORTS:
        raise invalid_request(f"'reasoning_effort' must be one of {_listed(_EFFORTS)}.", "reasoning_effort")
    said = {kwargs.thinking, kwargs.enable_thinking, None if effort is None else effort != _NO_EFFORT} - {None}
    if len(said) > 1:
        message = "'chat_template_kwargs' and 'reasoning_effort' contradict each other on thinking."
        raise invalid_request(message, "chat_template_kwargs")
    return said.pop() if said else None


def _response_format(body: ResponseFormatBody | None) -> inference_pb2.ResponseFormat | None:
    if body is None or body.type == "text":
        return None
    if body.type == "json_object":
        return inference_pb2.ResponseFormat()
    if body.type != "json_schema":
        message = "'response_format.type' must be one of 'text', 'json_object', 'json_schema'."
        raise invalid_request(message, "response_format.type")
    if body.json_schema is None:
        raise invalid_request("'response_format.json_schema' is required.", "response_format.json_schema")
    schema = _json_text(body.json_schema.schema, "response_format.json_schema.schema")
    return inference_pb2.ResponseFormat(json_schema=schema)


def _json_text(raw: msgspec.Raw, param: str) -> str:
    """The client's own text of a JSON value; "" for null."""
    if raw == _NULL:
        return ""
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError:
        raise invalid_request(f"'{param}' is not valid JSON.", param) from None


def _require_function(kind: str, param: str) -> None:
    if kind != "function":
        raise invalid_request(f"'{param}' must be 'function', the only type that is supported.", param)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))
