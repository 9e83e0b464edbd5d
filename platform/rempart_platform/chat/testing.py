"""A small chat format with everything that a large one has: reasoning, tools, a response format, all in plain tags.

prompt   system\n…\n⟨tool name⟩…   user\n…   assistant\n⟨think⟩…⟨/think⟩…⟨call name⟩{…}⟨/call⟩   tool\n…
answer   [reasoning⟨/think⟩] text ⟨call name⟩{…}⟨/call⟩ …          the first part only when thinking is on
"""

import re
from collections.abc import Sequence

from rempart_platform.chat.message import Conversation, Message
from rempart_platform.chat.output import (
    ContentText,
    OutputParser,
    OutputPart,
    ReasoningText,
    ToolCallArguments,
    ToolCallStart,
)
from rempart_platform.text.tokenizer import Tokenizer

_END_OF_REASONING = re.compile("⟨/think⟩")
_CALL = re.compile("⟨call ([^⟩]*)⟩")
_END_OF_CALL = re.compile("⟨/call⟩")


class TagChat:
    """Renders every turn between the tokens with which ChatML does. `is_thinking`: unless the client says otherwise."""

    control_tokens = frozenset[str]()

    def __init__(self, tokenizer: Tokenizer, *, is_thinking: bool = False) -> None:
        self._tokenizer = tokenizer
        self._is_thinking = is_thinking
        self._start = tokenizer.special_token_id("<|im_start|>")
        self._end = tokenizer.special_token_id("<|im_end|>")

    def render(self, conversation: Conversation) -> list[int]:
        tools = "".join(f"⟨tool {tool.name}⟩{tool.parameters}" for tool in conversation.tools)
        schema = conversation.response_schema
        turns = [
            *([f"tools\n{tools}"] if tools else []),
            *([f"schema\n{schema.schema}"] if schema is not None else []),
            *(f"{message.role}\n{_spoken(message)}" for message in conversation.messages),
        ]
        token_ids = [token_id for turn in turns for token_id in (self._start, *self._tokenizer.encode(turn), self._end)]
        opening = "assistant\n⟨think⟩" if self._thinks(conversation) else "assistant\n"
        return [*token_ids, self._start, *self._tokenizer.encode(opening)]

    def output_parser(self, conversation: Conversation) -> OutputParser | None:
        return TagParser(is_thinking=self._thinks(conversation))

    def _thinks(self, conversation: Conversation) -> bool:
        return self._is_thinking if conversation.thinking is None else conversation.thinking


class TagParser:
    """Holds back from an opening bracket on until the tag is whole. Call ids count from `call_0`."""

    def __init__(self, *, is_thinking: bool) -> None:
        self._held = ""
        self._is_thinking = is_thinking
        self._is_in_call = False
        self._num_calls = 0

    def push(self, text: str) -> Sequence[OutputPart]:
        self._held += text
        parts: list[OutputPart] = []
        while (tag := self._tag().search(self._held)) is not None:
            parts += self._plain(self._held[: tag.start()])
            parts += self._turn(tag)
            self._held = self._held[tag.end() :]
        bracket = self._held.find("⟨")
        certain = len(self._held) if bracket < 0 else bracket
        parts += self._plain(self._held[:certain])
        self._held = self._held[certain:]
        return parts

    def finish(self) -> Sequence[OutputPart]:
        held, self._held = self._held, ""
        return self._plain(held)

    def _tag(self) -> re.Pattern[str]:
        if self._is_thinking:
            return _END_OF_REASONING
        return _END_OF_CALL if self._is_in_call else _CALL

    def _turn(self, tag: re.Match[str]) -> list[OutputPart]:
        if self._is_thinking:
            self._is_thinking = False
            return []
        if self._is_in_call:
            self._is_in_call = False
            return []
        self._is_in_call = True
        self._num_calls += 1
        index = self._num_calls - 1
        return [ToolCallStart(index, f"call_{index}", tag.group(1))]

    def _plain(self, text: str) -> list[OutputPart]:
        if not text:
            return []
        if self._is_thinking:
            return [ReasoningText(text)]
        return [ToolCallArguments(self._num_calls - 1, text)] if self._is_in_call else [ContentText(text)]


def _spoken(message: Message) -> str:
    reasoning = f"⟨think⟩{message.reasoning}⟨/think⟩" if message.reasoning else ""
    calls = "".join(f"⟨call {call.name}⟩{call.arguments}⟨/call⟩" for call in message.tool_calls)
    return f"{reasoning}{message.content}{calls}"
