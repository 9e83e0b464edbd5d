"""Which conversations make sense. Whatever passes here, a chat format can render, or refuses for what it cannot say."""

import re
from collections.abc import Iterable
from typing import Final, TypeAlias

import msgspec

from rempart_platform.chat.message import Conversation, Message, ResponseSchema, Role, Tool, ToolCall
from rempart_platform.errors import invalid_request
from rempart_platform.json_guard import check_json_shape
from rempart_platform.request_limits import RequestLimits, require_at_most
from rempart_protos.v1 import inference_pb2

ConversationMessage: TypeAlias = inference_pb2.ChatRequest | inference_pb2.TokenizeRequest
"""Both say a conversation in fields of the same names."""

_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_TOOL_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_JSON_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def check_conversation_size(request: ConversationMessage, limits: RequestLimits) -> int:
    """Characters of all its texts together; cheap. Raises RempartError INVALID_REQUEST that names the limit met."""
    if not request.messages:
        raise invalid_request("'messages' must hold at least one message.", "messages")
    num_chars = sum(map(_num_message_chars, request.messages))
    num_tool_chars = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in request.tools)
    num_schema_chars = len(request.response_format.json_schema)
    require_at_most(len(request.messages), limits, "max_messages", "messages", unit="messages")
    require_at_most(num_chars, limits, "max_prompt_chars", "messages", unit="characters")
    require_at_most(len(request.tools), limits, "max_tools", "tools", unit="tools")
    require_at_most(num_tool_chars, limits, "max_tool_chars", "tools", unit="characters")
    require_at_most(num_schema_chars, limits, "max_schema_chars", "response_format", unit="characters")
    return num_chars + num_tool_chars + num_schema_chars


def to_conversation(request: ConversationMessage, limits: RequestLimits) -> Conversation:
    """The conversation, of a size that was checked. Raises RempartError INVALID_REQUEST naming the field at fault."""
    messages = tuple(_message(message, position, limits) for position, message in enumerate(request.messages))
    _check_calls(messages)
    tools = tuple(_tool(tool, position, limits) for position, tool in enumerate(request.tools))
    _require_unique((tool.name for tool in tools), "name", "tools")
    _check_tool_choice(request.tool_choice, tools)
    return Conversation(
        messages=messages,
        tools=() if request.tool_choice.mode == inference_pb2.ToolChoice.MODE_NONE else tools,
        thinking=request.thinking if request.HasField("thinking") else None,
        response_schema=_response_schema(request, limits),
    )


def _num_message_chars(message: inference_pb2.ChatMessage) -> int:
    calls = sum(len(call.id) + len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning) + len(message.tool_call_id) + calls


def _message(message: inference_pb2.ChatMessage, position: int, limits: RequestLimits) -> Message:
    param = f"messages[{position}]"
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid_request(f"'{param}.role' must be one of {', '.join(map(repr, _ROLES))}.", f"{param}.role")
    for name, owner in (("reasoning", "assistant"), ("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if role != owner and getattr(message, name):
            raise invalid_request(f"'{param}.{name}' is for messages of the role '{owner}' alone.", f"{param}.{name}")
    if role == "tool" and not message.tool_call_id:
        raise invalid_request(f"'{param}.tool_call_id' is required.", f"{param}.tool_call_id")
    calls = tuple(_tool_call(call, f"{param}.tool_calls[{i}]", limits) for i, call in enumerate(message.tool_calls))
    return Message(role, message.content, message.reasoning, calls, message.tool_call_id)


def _tool_call(call: inference_pb2.ToolCall, param: str, limits: RequestLimits) -> ToolCall:
    # The name is what some model wrote, so it need not be one that a tool may have.
    for name in ("id", "name"):
        if not getattr(call, name):
            raise invalid_request(f"'{param}.{name}' is required.", f"{param}.{name}")
    arguments = call.arguments or "{}"
    _require_object(arguments, f"{param}.arguments", limits)
    return ToolCall(call.id, call.name, arguments)


def _check_calls(messages: Iterable[Message]) -> None:
    """Calls have ids of their own, and each tool message answers one that came before and that no other answers."""
    called: set[str] = set()
    unanswered: set[str] = set()
    for position, message in enumerate(messages):
        for call in message.tool_calls:
            if call.id in called:
                param = f"messages[{position}].tool_calls"
                raise invalid_request(
                    f"'{param}' has an id that an earlier call has already: {_shown(call.id)}.", param
                )
            called.add(call.id)
            unanswered.add(call.id)
        if message.role == "tool":
            if message.tool_call_id not in unanswered:
                which = "was answered before" if message.tool_call_id in called else "no earlier message made"
                param = f"messages[{position}].tool_call_id"
                raise invalid_request(f"'{param}' names a call that {which}: {_shown(message.tool_call_id)}.", param)
            unanswered.remove(message.tool_call_id)


def _tool(tool: inference_pb2.Tool, position: int, limits: RequestLimits) -> Tool:
    if not _TOOL_NAME.fullmatch(tool.name):
        param = f"tools[{position}].name"
        raise invalid_request(f"'{param}' must be 1 to 64 of the characters a-z, A-Z, 0-9, _ and -.", param)
    if tool.parameters:
        _require_object(tool.parameters, f"tools[{position}].parameters", limits)
    return Tool(tool.name, tool.description, tool.parameters, tool.strict)


def _check_tool_choice(choice: inference_pb2.ToolChoice, tools: tuple[Tool, ...]) -> None:
    is_function = choice.WhichOneof("choice") == "function"
    if choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED and not tools:
        raise invalid_request("'tool_choice' requires a call, but there are no tools.", "tool_choice")
    if is_function and choice.function not in {tool.name for tool in tools}:
        message = f"'tool_choice' names a function that is not among the tools: {_shown(choice.function)}."
        raise invalid_request(message, "tool_choice")
    if is_function or choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED:
        message = "'tool_choice' can be 'auto' or 'none': a model cannot be forced to call a tool here yet."
        raise invalid_request(message, "tool_choice")
    if choice.mode not in inference_pb2.ToolChoice.Mode.values():
        raise invalid_request("'tool_choice' has a mode that is not known.", "tool_choice")


def _response_schema(request: ConversationMessage, limits: RequestLimits) -> ResponseSchema | None:
    if not request.HasField("response_format"):
        return None
    schema = request.response_format.json_schema
    if schema:
        _require_object(schema, "response_format", limits)
    return ResponseSchema(schema)


def _require_object(text: str, param: str, limits: RequestLimits) -> None:
    """Raises unless the text is a JSON object that is cheap to parse."""
    data = text.encode()
    check_json_shape(data, max_nodes=limits.max_json_nodes, max_depth=limits.max_json_depth, param=param)
    try:
        _JSON_OBJECT.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise invalid_request(f"'{param}' must be the text of a JSON object.", param) from None


def _require_unique(values: Iterable[str], what: str, param: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise invalid_request(f"'{param}' has two of the same {what}: {_shown(value)}.", param)
        seen.add(value)


def _shown(text: str) -> str:
    return repr(text[:64])
