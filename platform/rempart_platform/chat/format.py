"""What every chat format can do, and which one a model speaks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from rempart_platform.chat.chatml import ChatML
from rempart_platform.chat.deepseek_exp import DeepSeekExp
from rempart_platform.chat.deepseek_profile import V32, V32_EXP, V32_SPECIALE
from rempart_platform.chat.deepseek_v32 import DeepSeekV32
from rempart_platform.chat.message import Conversation
from rempart_platform.chat.output import OutputParser
from rempart_platform.chat.tool_token_calls import CALLS
from rempart_platform.text.text_model import TextModel


class ChatFormat(Protocol):
    """A conversation to the prompt that makes the model answer it, and the answer's text to its parts."""

    @property
    def control_tokens(self) -> frozenset[str]:
        """Special tokens that the parser has to see in the text of an answer, by name."""
        ...

    def render(self, conversation: Conversation) -> list[int]:
        """Prompt token ids; the messages' own text never becomes a special token.

        Raises:
            RempartError: INVALID_REQUEST for what this format cannot say (a role, tools, thinking), or for a text
                that cannot be tokenized; `param` names the field.
        """
        ...

    def output_parser(self, conversation: Conversation) -> OutputParser | None:
        """A parser for one choice of the answer; None when its text is content as it is."""
        ...


CHAT_FORMATS: Final[Mapping[str, Callable[[TextModel], ChatFormat]]] = {
    "chatml": ChatML.for_model,
    V32.name: lambda model: DeepSeekV32(model.tokenizer, V32),
    V32_SPECIALE.name: lambda model: DeepSeekV32(model.tokenizer, V32_SPECIALE),
    V32_EXP.name: lambda model: DeepSeekExp(model.tokenizer),
}
"""By the name under which an operator can choose them."""


def find_chat_format(model: TextModel, names: Sequence[str] = (), chosen: str | None = None) -> ChatFormat | None:
    """The format that the model was trained on; None when it is not one of ours.

    Args:
        model: what is known of it.
        names: what people call it: of its folder, under which it is served.
        chosen: one of `CHAT_FORMATS`, whatever the model shows.

    Raises:
        ValueError: the tokenizer lacks a special token of the format.
    """
    name = chosen or _shown_format(model, names)
    return CHAT_FORMATS[name](model) if name else None


def _shown_format(model: TextModel, names: Sequence[str]) -> str | None:
    """Weights and config of the V3.2 models are of one shape: only a template or a name tells them apart."""
    template = model.chat_template or ""
    if model.architecture == "DeepseekV32ForCausalLM":
        if "thinking" in template and CALLS.name in template:
            return V32_EXP.name
        is_speciale = any("speciale" in name.lower() for name in names)
        return V32_SPECIALE.name if is_speciale else V32.name
    return "chatml" if "<|im_start|>" in template else None
