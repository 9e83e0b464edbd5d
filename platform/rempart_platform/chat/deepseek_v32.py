"""The chat format of DeepSeek-V3.2 and V3.2-Speciale.

    <BOS>{system}<User>{question}<Assistant></think>{answer}<EOS>
                 <User>{last question}<Assistant><think>{reasoning}</think>{answer}{calls}<EOS>
                 {results}<think>                                           ... from here on, the model writes

Tools and the response format stand at the end of a system message at the beginning. A developer's message is a
question in words of its own. Answers up to the last question carry no reasoning, so a tool loop sees the reasoning of
its own answers, and the next question forgets it.
"""

from collections.abc import Callable

from rempart_platform.chat.call_ids import mint_call_id
from rempart_platform.chat.deepseek_profile import DeepSeekProfile
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
from rempart_platform.chat.dsml import DSML, calls_block, response_block, results_block, tools_block
from rempart_platform.chat.dsml_calls import DsmlCalls
from rempart_platform.chat.dsml_scanner import MARKED_CALLS
from rempart_platform.chat.message import Conversation, Message
from rempart_platform.chat.output import OutputParser
from rempart_platform.chat.prompt import Control, Piece, encode_pieces
from rempart_platform.chat.reasoning import ReasoningParser
from rempart_platform.chat.turns import Answer, ToolResults, Turn, turns_of
from rempart_platform.text.tokenizer import Tokenizer

_DEVELOPER = "\n\n# The user's message is: "


class DeepSeekV32:
    """Renders for one tokenizer, and reads the answers.

    Args:
        tokenizer: of the model.
        profile: which model of the family it is.
        mint_call_id: an id for each tool call.

    Raises:
        ValueError: the tokenizer lacks one of the format's special tokens.
    """

    control_tokens = frozenset({THINK.name, END_THINK.name, DSML.name})

    def __init__(
        self, tokenizer: Tokenizer, profile: DeepSeekProfile, mint_call_id: Callable[[], str] = mint_call_id
    ) -> None:
        require_special(tokenizer, SHARED)
        self.profile = profile
        self._tokenizer = tokenizer
        self._mint_call_id = mint_call_id

    def render(self, conversation: Conversation) -> list[int]:
        """Prompt token ids, up to where the model's reasoning or answer begins.

        Raises:
            RempartError: INVALID_REQUEST for what this model cannot do, for calls and results that do not belong
                together, or for a text that cannot be tokenized; `param` names the field.
        """
        return encode_pieces(prompt_pieces(conversation, self.profile.decide_thinking(conversation)), self._tokenizer)

    def output_parser(self, conversation: Conversation) -> OutputParser:
        """A parser for one choice of the answer."""
        is_thinking = self.profile.decide_thinking(conversation)
        if not conversation.tools:
            return ReasoningParser(is_thinking)
        calls = DsmlCalls(conversation.tools, self._mint_call_id)
        # A model in a hurry calls a tool without ending its thought.
        return ReasoningParser(is_thinking, calls, ends_at=(MARKED_CALLS,))


def prompt_pieces(conversation: Conversation, is_thinking: bool) -> list[Piece]:
    """The prompt. Raises RempartError as `render`."""
    turns = _with_instructions_first(turns_of(conversation.messages), conversation)
    last_question = max((at for at, turn in enumerate(turns) if _is_question(turn)), default=-1)
    pieces: list[Piece] = [BOS]
    opening: Control | None = None
    for position, turn in enumerate(turns):
        match turn:
            case Answer():
                pieces += _answer(turn, has_reasoning=opening == THINK)
                opening = None
            case Message(role="system"):
                pieces += _system(turn, conversation if position == 0 else None)
                opening = None
            case _:
                opening = THINK if is_thinking and position >= last_question else END_THINK
                pieces += [*_question_or_results(turn), opening]
    if opening is None:
        pieces += [ASSISTANT, THINK if is_thinking else END_THINK]
    return pieces


def _with_instructions_first(turns: list[Turn], conversation: Conversation) -> list[Turn]:
    """The turns, with a system message at the beginning when something has to stand in it."""
    has_instructions = bool(conversation.tools) or conversation.response_schema is not None
    has_place = bool(turns) and isinstance(turns[0], Message) and turns[0].role == "system"
    return [Message("system", ""), *turns] if has_instructions and not has_place else turns


def _system(message: Message, instructions: Conversation | None) -> list[Piece]:
    pieces: list[Piece] = [message.content]
    if instructions is not None and instructions.tools:
        pieces += ["\n\n", *tools_block(instructions.tools)]
    if instructions is not None and instructions.response_schema is not None:
        pieces += ["\n\n", response_block(instructions.response_schema)]
    return pieces


def _question_or_results(turn: Message | ToolResults) -> list[Piece]:
    if isinstance(turn, ToolResults):
        return [results_block(turn)]
    return [USER, (_DEVELOPER if turn.role == "developer" else "") + turn.content, ASSISTANT]


def _answer(answer: Answer, has_reasoning: bool) -> list[Piece]:
    reasoning: list[Piece] = [answer.reasoning, END_THINK] if has_reasoning else []
    return [*reasoning, answer.content, *calls_block(answer.calls), EOS]


def _is_question(turn: Turn) -> bool:
    return isinstance(turn, Message) and turn.role in ("user", "developer")
