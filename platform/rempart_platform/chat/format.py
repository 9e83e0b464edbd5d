"""What every chat format can do, and which one a model speaks."""

from typing import Protocol

from rempart_platform.chat.chatml import ChatML
from rempart_platform.chat.message import Conversation
from rempart_platform.chat.output import OutputParser
from rempart_platform.text.text_model import TextModel


class ChatFormat(Protocol):
    """A conversation to the prompt that makes the model answer it, and the answer's text to its parts."""

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


def find_chat_format(model: TextModel) -> ChatFormat | None:
    """The format that the model was trained on; None when it is not one of ours."""
    if model.chat_template is not None and "<|im_start|>" in model.chat_template:
        return ChatML.for_model(model)
    return None
