"""The chat format of DeepSeek-V3.2-Exp, which is that of V3.1.

    <BOS>{system}{tools}<User>{question}<Assistant></think>{answer}{calls}<EOS>{results}    ... the model goes on

Reasoning is never sent back. Tools were trained without thinking.
"""

from collections.abc import Callable, Sequence

from rempart_platform.chat.call_ids import mint_call_id
from rempart_platform.chat.deepseek_profile import V32_EXP
from rempart_platform.chat.deepseek_tags import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    SHARED,
    THINK,
    USER,
    require_special,
)
from rempart_platform.chat.dsml import parameters_of
from rempart_platform.chat.json_text import write_json
from rempart_platform.chat.message import Conversation, Message, Tool
from rempart_platform.chat.output import OutputParser
from rempart_platform.chat.prompt import Control, Piece, encode_pieces, fill
from rempart_platform.chat.reasoning import ReasoningParser
from rempart_platform.chat.tool_token_calls import ARGUMENTS, CALL, CALLS, END_CALL, END_CALLS, TAGS, ToolTokenCalls
from rempart_platform.chat.turns import Answer, ToolResults, Turn, turns_of
from rempart_platform.errors import invalid_request
from rempart_platform.text.tokenizer import Tokenizer

_RESULT = Control("<｜tool▁output▁begin｜>")
_END_RESULT = Control("<｜tool▁output▁end｜>")

_TOOLS = "## Tools\nYou have access to the following tools:\n\n"
_TOOL = "### {name}\nDescription: {description}\n\nParameters: {parameters}\n\n"
# As the model card shows it. The field in the middle of the tags is part of the text.
_TOOL_RULES = """IMPORTANT: ALWAYS adhere to this exact format for tool use:
{calls}{call}tool_call_name{arguments}tool_call_arguments{end_call}{additional}{end_calls}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""


class DeepSeekExp:
    """Renders for one tokenizer, and reads the answers.

    Args:
        tokenizer: of the model.
        mint_call_id: an id for each tool call.

    Raises:
        ValueError: the tokenizer lacks one of the format's special tokens.
    """

    control_tokens = frozenset(tag.name for tag in (THINK, END_THINK, *TAGS))
    profile = V32_EXP

    def __init__(self, tokenizer: Tokenizer, mint_call_id: Callable[[], str] = mint_call_id) -> None:
        require_special(tokenizer, (*SHARED, *TAGS, _RESULT, _END_RESULT))
        self._tokenizer = tokenizer
        self._mint_call_id = mint_call_id

    def render(self, conversation: Conversation) -> list[int]:
        """Prompt token ids, up to where the model's reasoning or answer begins.

        Raises:
            RempartError: INVALID_REQUEST for what this model cannot do, for calls and results that do not belong
                together, or for a text that cannot be tokenized; `param` names the field.
        """
        return encode_pieces(self._pieces(conversation), self._tokenizer)

    def output_parser(self, conversation: Conversation) -> OutputParser:
        """A parser for one choice of the answer."""
        is_thinking = self.profile.decide_thinking(conversation)
        if not conversation.tools:
            return ReasoningParser(is_thinking)
        return ReasoningParser(is_thinking, ToolTokenCalls(conversation.tools, self._mint_call_id))

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        is_thinking = self.profile.decide_thinking(conversation)
        if conversation.response_schema is not None:
            raise invalid_request("A response format is not supported by this model's chat format.", "response_format")
        turns = turns_of(conversation.messages)
        goes_on = bool(turns) and isinstance(turns[-1], ToolResults)
        if goes_on and is_thinking:
            raise invalid_request("This model cannot think about tools' results; 'thinking' must be false.", "thinking")
        pieces = [BOS, *_system(turns), *_tools(conversation.tools), *_dialogue(turns)]
        return pieces if goes_on else [*pieces, ASSISTANT, THINK if is_thinking else END_THINK]


def _system(turns: Sequence[Turn]) -> list[Piece]:
    """All system messages at the beginning; developer is OpenAI's newer word for them."""
    return ["\n\n".join(turn.content for turn in turns if isinstance(turn, Message) and turn.role != "user")]


def _tools(tools: Sequence[Tool]) -> list[Piece]:
    if not tools:
        return []
    described: list[Piece] = ["\n\n", _TOOLS]
    for position, tool in enumerate(tools):
        parameters = write_json(parameters_of(tool, position)) if tool.parameters else "{}"
        described += fill(_TOOL, name=tool.name, description=tool.description, parameters=parameters)
    return described + fill(
        _TOOL_RULES,
        calls=CALLS,
        call=CALL,
        arguments=ARGUMENTS,
        end_call=END_CALL,
        additional="{additional_tool_calls}",
        end_calls=END_CALLS,
    )


def _dialogue(turns: Sequence[Turn]) -> list[Piece]:
    pieces: list[Piece] = []
    before: Turn | None = None
    for turn in turns:
        match turn:
            case Answer():
                follows_question = isinstance(before, Message) and before.role == "user"
                pieces += [ASSISTANT, END_THINK] if follows_question else []
                pieces += _answer(turn, before)
            case ToolResults():
                pieces += [piece for content in turn.contents for piece in (_RESULT, content, _END_RESULT)]
            case Message(role="user"):
                pieces += [USER, turn.content]
            case _:
                continue
        before = turn
    return pieces


def _answer(answer: Answer, before: Turn | None) -> list[Piece]:
    content = answer.content
    if not answer.calls and not isinstance(before, ToolResults):
        # Clients send back what older servers gave them, reasoning and all.
        content = content.split(END_THINK.name, 1)[-1]
    pieces: list[Piece] = [content]
    if answer.calls:
        calls = [piece for call in answer.calls for piece in (CALL, call.name, ARGUMENTS, call.text, END_CALL)]
        pieces += [CALLS, *calls, END_CALLS]
    return [*pieces, EOS]
