"""Text to token ids and token ids to exact bytes.

Special tokens are no text: `encode` never yields one, whatever the text says, so a tenant who writes "<|im_end|>" gets
the ids of those characters. Chat formats place special tokens by id (`special_token_id`).
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import tokenizers

from rempart_platform.errors import invalid_request

# Longer work is moved off the event loop; this many characters take about a third of a millisecond.
_MAX_INLINE_CHARS = 2_000

_T = TypeVar("_T")


class Tokenizer:
    """An immutable byte-level tokenizer.

    Args:
        backend: splits and merges plain text; must know no special tokens.
        token_bytes: the exact bytes of each token id; special tokens as the UTF-8 of their name.
        special_token_ids: name of each special token to its id.
        visible_token_ids: special tokens that are shown in output (marks like "<think>").
        prefix_token_ids: what the model expects before a raw text (for Llama 3: begin-of-text), often nothing.
        eos_token_ids: ids with which the model ends its output.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        token_bytes: Sequence[bytes],
        special_token_ids: Mapping[str, int],
        *,
        visible_token_ids: Collection[int] = (),
        prefix_token_ids: tuple[int, ...] = (),
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._backend = backend
        self._token_bytes = tuple(token_bytes)
        self._special_token_ids = dict(special_token_ids)
        self._hidden_ids = frozenset(special_token_ids.values()).difference(visible_token_ids)
        self._prefix_token_ids = prefix_token_ids
        self.eos_token_ids = eos_token_ids

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._token_bytes)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of plain text, after the model's own prefix when `add_special`.

        Raises:
            RempartError: INVALID_REQUEST when the tokenizer cannot take this text.
        """
        prefix = list(self._prefix_token_ids) if add_special else []
        return prefix + self._encode_plain(text)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except TypeError:  # lone surrogates: a str that is no Unicode text
            raise invalid_request("The text is not valid Unicode.") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # The native tokenizer panics with an exception outside of Exception's tree; it harms this text alone.
            raise invalid_request("The text could not be tokenized.") from error

    def decode_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token; nothing for ids that the model has and the vocabulary has not."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the token ids without hidden tokens; bytes that are no character become U+FFFD."""
        plain = (self.decode_bytes(token_id) for token_id in token_ids if token_id not in self._hidden_ids)
        return b"".join(plain).decode("utf-8", errors="replace")

    def is_hidden(self, token_id: int) -> bool:
        """Whether the token is never shown in output."""
        return token_id in self._hidden_ids

    def special_token_id(self, name: str) -> int:
        """Id of a special token by its name. Raises KeyError when the model has none such."""
        return self._special_token_ids[name]

    def has_special_token(self, name: str) -> bool:
        """Whether the model has a special token of this name."""
        return name in self._special_token_ids

    def showing(self, names: Collection[str]) -> "Tokenizer":
        """The same tokenizer, with those of these special tokens that the model has shown in output."""
        shown = {token_id for name, token_id in self._special_token_ids.items() if name in names}
        if not self._hidden_ids & shown:
            return self
        return Tokenizer(
            self._backend,
            self._token_bytes,
            self._special_token_ids,
            visible_token_ids=shown.union(self._special_token_ids.values()).difference(self._hidden_ids - shown),
            prefix_token_ids=self._prefix_token_ids,
            eos_token_ids=self.eos_token_ids,
        )


async def run_sized(num_chars: int, work: Callable[[], _T]) -> _T:
    """Result of text work on `num_chars` characters: done here when short, in a thread when it would stop the loop."""
    if num_chars <= _MAX_INLINE_CHARS:
        return work()
    return await asyncio.to_thread(work)
