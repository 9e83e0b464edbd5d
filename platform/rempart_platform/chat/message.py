"""A conversation as every chat format takes it."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant called; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who said what.

    `reasoning` and `tool_calls` belong to the assistant, `tool_call_id` to a tool's result.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the assistant may call; `parameters` is the text of a JSON schema, "" for none."""

    name: str
    description: str = ""
    parameters: str = ""
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ResponseSchema:
    """What the answer must look like: the text of a JSON schema, or "" for any JSON object."""

    schema: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with what shapes the answer to them.

    `thinking` None leaves it to the model's own default.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    thinking: bool | None = None
    response_schema: ResponseSchema | None = None
