"""What the models of the DeepSeek-V3.2 family can be asked for."""

from dataclasses import dataclass
from typing import Literal

from rempart_platform.chat.message import Conversation
from rempart_platform.errors import invalid_request


@dataclass(frozen=True, slots=True)
class DeepSeekProfile:
    """One model of the family."""

    name: str
    thinking: Literal["on request", "always"]
    tools: Literal["always", "without thinking", "never"]

    def decide_thinking(self, conversation: Conversation) -> bool:
        """Whether the answer begins with reasoning.

        Raises:
            RempartError: INVALID_REQUEST for what the model was not trained to do; `param` names the field.
        """
        if self.thinking == "always" and conversation.thinking is False:
            raise invalid_request("This model always thinks; 'thinking' cannot be false.", "thinking")
        is_thinking = self.thinking == "always" or conversation.thinking is True
        if conversation.tools and self.tools == "never":
            raise invalid_request("This model cannot call tools; 'tools' must be empty.", "tools")
        if conversation.tools and is_thinking and self.tools == "without thinking":
            raise invalid_request("This model cannot call tools while it thinks; 'thinking' must be false.", "thinking")
        return is_thinking


V32 = DeepSeekProfile("deepseek_v32", thinking="on request", tools="always")
V32_SPECIALE = DeepSeekProfile("deepseek_v32_speciale", thinking="always", tools="never")
V32_EXP = DeepSeekProfile("deepseek_v32_exp", thinking="on request", tools="without thinking")
