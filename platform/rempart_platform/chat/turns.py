"""A conversation's messages as turns: every answer's calls together with the results that follow, in order.

Formats write results without the ids of their calls, so a result must stand where its call stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rempart_platform.chat.json_text import read_object
from rempart_platform.chat.message import Message
from rempart_platform.errors import invalid_request


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: `arguments` are the members of the object that `text` holds."""

    name: str
    text: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the assistant said, thought and called."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class ToolResults:
    """The results of all calls of the answer before, in the order of the calls."""

    contents: tuple[str, ...]


Turn = Message | Answer | ToolResults
"""A `Message` is of the system, a developer or a user."""


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """The turns.

    Raises:
        RempartError: INVALID_REQUEST for arguments that are no JSON object, a call without its result, or a result
            without its call; `param` names the message.
    """
    turns: list[Turn] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        match message.role:
            case "assistant":
                turns.append(_answer(message, position - 1))
                if message.tool_calls:
                    turns.append(_results(messages, position - 1))
                    position += len(message.tool_calls)
            case "tool":
                name = f"messages[{position - 1}]"
                raise invalid_request(f"'{name}' is a tool's result, and no tool call waits for one.", name)
            case _:
                turns.append(message)
    return turns


def _answer(message: Message, position: int) -> Answer:
    calls = []
    for number, call in enumerate(message.tool_calls):
        param = f"messages[{position}].tool_calls[{number}]"
        try:
            arguments = read_object(call.arguments)
        except ValueError as error:
            raise invalid_request(
                f"The arguments of '{param}' must be the text of a JSON object: {error}.", param
            ) from None
        calls.append(Call(call.name, call.arguments if call.arguments.strip() else "{}", arguments))
    return Answer(message.content, message.reasoning, tuple(calls))


def _results(messages: Sequence[Message], position: int) -> ToolResults:
    """The results that follow the answer at `position`, each in its call's place."""
    calls = messages[position].tool_calls
    contents: dict[int, str] = {}
    for offset in range(1, len(calls) + 1):
        if position + offset == len(messages) or messages[position + offset].role != "tool":
            param = f"messages[{position}].tool_calls"
            raise invalid_request(
                f"'{param}' has {len(calls)} calls, and {offset - 1} of their results follow; each call needs one.",
                param,
            )
        result = messages[position + offset]
        waiting = [
            number
            for number, call in enumerate(calls)
            if number not in contents and result.tool_call_id in ("", call.id)
        ]
        if not waiting:
            param = f"messages[{position + offset}].tool_call_id"
            raise invalid_request(f"'{param}' names none of the calls that wait for a result.", param)
        contents[waiting[0]] = result.content
    return ToolResults(tuple(contents[number] for number in range(len(calls))))
