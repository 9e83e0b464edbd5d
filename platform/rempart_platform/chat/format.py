"""What every chat format can do, and which one a model speaks."""

from collections.abc import Sequence
from typing import Protocol

from rempart_platform.chat.chatml import ChatML
from rempart_platform.chat.message import Message
from rempart_platform.text.text_model import TextModel


class ChatFormat(Protocol):
    """Messages to the prompt that makes the model answer them."""

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Prompt token ids; the messages' own text never becomes a special token.

        Raises:
            RempartError: INVALID_REQUEST for a text that cannot be tokenized.
        """
        ...


def find_chat_format(model: TextModel) -> ChatFormat | None:
    """The format that the model's template shows it was trained on; None when it is not one of ours."""
    if model.chat_template is not None and "<|im_start|>" in model.chat_template:
        return ChatML.for_model(model)
    return None
