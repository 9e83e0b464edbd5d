"""The control tags that DeepSeek's V3 series shares. The bar is U+FF5C, the low block U+2581."""

from rempart_platform.chat.prompt import Control
from rempart_platform.text.tokenizer import Tokenizer

BOS = Control("<｜begin▁of▁sentence｜>")
EOS = Control("<｜end▁of▁sentence｜>")
USER = Control("<｜User｜>")
ASSISTANT = Control("<｜Assistant｜>")
THINK = Control("<think>")
END_THINK = Control("</think>")

SHARED = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)


def require_special(tokenizer: Tokenizer, tags: tuple[Control, ...]) -> None:
    """Raises ValueError naming the tags that are no special tokens of this tokenizer."""
    missing = [tag.name for tag in tags if not tokenizer.has_special_token(tag.name)]
    if missing:
        raise ValueError(f"the tokenizer has no special token {', '.join(missing)}")
