"""What of a model is about text: its tokenizer and the template of its chat format."""

from dataclasses import dataclass

from rempart_platform.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextModel:
    """`chat_template` is only looked at to recognise the format; no template is ever run.

    `architecture` is the name that the model's config gives to its kind, such as "DeepseekV32ForCausalLM".
    """

    tokenizer: Tokenizer
    chat_template: str | None
    architecture: str | None = None
