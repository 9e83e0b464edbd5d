r"""ChatML: `<|im_start|>role\ncontent<|im_end|>\n` for each message, then `<|im_start|>assistant\n`."""

import re

from rempart_platform.chat.message import Conversation, Message
from rempart_platform.chat.output import OutputParser
from rempart_platform.errors import RempartError, invalid_request
from rempart_platform.text.text_model import TextModel
from rempart_platform.text.tokenizer import Tokenizer

# A system message written out in the template, its line break as itself or as an escape of the template's own string.
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^{}'\"<]+)<\|im_end\|>")


class ChatML:
    """Renders for one tokenizer; `default_system` opens a conversation that starts with no system message."""

    control_tokens = frozenset[str]()

    def __init__(self, tokenizer: Tokenizer, default_system: str | None) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.special_token_id("<|im_start|>")
        self._end = tokenizer.special_token_id("<|im_end|>")
        self._line_break = tokenizer.encode("\n")
        self._answer = [self._start, *tokenizer.encode("assistant\n")]
        self._opening = [] if default_system is None else self._render_turn(Message("system", default_system))

    @classmethod
    def for_model(cls, model: TextModel) -> "ChatML":
        """With the default system message that the model's template spells out, if any."""
        found = _DEFAULT_SYSTEM.search(model.chat_template or "")
        return cls(model.tokenizer, found.group(1) if found else None)

    def render(self, conversation: Conversation) -> list[int]:
        """Prompt token ids, ready for the assistant's answer.

        Raises:
            RempartError: INVALID_REQUEST for tools, thinking or a response schema, which ChatML has no words for.
        """
        _refuse_unknown(conversation)
        turns = conversation.messages
        token_ids = [] if turns and turns[0].role == "system" else [*self._opening]
        for turn in turns:
            token_ids += self._render_turn(turn)
        return token_ids + self._answer

    def output_parser(self, conversation: Conversation) -> OutputParser | None:
        """None: the answer is content as it is."""
        return None

    def _render_turn(self, turn: Message) -> list[int]:
        role = "system" if turn.role == "developer" else turn.role  # OpenAI's newer word for it
        text = self._tokenizer.encode(f"{role}\n{turn.content}")
        return [self._start, *text, self._end, *self._line_break]


def _refuse_unknown(conversation: Conversation) -> None:
    if conversation.tools:
        raise _unknown("Tools are", "tools")
    if conversation.thinking:
        raise _unknown("Thinking is", "thinking")
    if conversation.response_schema is not None:
        raise _unknown("A response format is", "response_format")
    for position, message in enumerate(conversation.messages):
        if message.role == "tool" or message.tool_calls:
            raise _unknown("Tool calls are", f"messages[{position}]")


def _unknown(subject: str, param: str) -> RempartError:
    return invalid_request(f"{subject} not supported by this model's chat format.", param)
