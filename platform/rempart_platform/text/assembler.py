"""Token ids of one choice to the text its client sees.

    token ids ─► bytes ─► whole characters ─► text without stop strings
                 │           └ partial character held back
                 └ hidden and end tokens have none     └ possible stop string held back

A token counts as delivered together with the last character of its text, so ids and log-probabilities of an increment
always belong to text that is out.
"""

from collections import deque
from collections.abc import Collection, Sequence

import msgspec

from rempart_platform.generation import TextLogprob
from rempart_platform.text.detokenizer import IncrementalDetokenizer
from rempart_platform.text.stop_strings import StopMatcher, StopStrings
from rempart_platform.text.tokenizer import Tokenizer


class TextIncrement(msgspec.Struct, frozen=True):
    """New text with the tokens it completes. A struct, as `Delta` is.

    `ends[i]` is how much of the text the tokens up to i amount to by themselves, half characters left out: token i
    brings `text[ends[i - 1] : ends[i]]`. `is_stopped`: a stop string ended the output.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TextLogprob, ...] = ()
    ends: tuple[int, ...] = ()
    is_stopped: bool = False

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids)

    def then(self, later: "TextIncrement") -> "TextIncrement":
        """Both as one."""
        return TextIncrement(
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            self.ends + tuple(len(self.text) + end for end in later.ends),
            later.is_stopped,
        )


class _Pending(msgspec.Struct, frozen=True):
    token_id: int
    logprob: TextLogprob | None
    num_chars: int
    """Of the output up to this token, without half characters."""
    end: int
    """Number of characters of the output when the token's text is whole."""


class TextAssembler:
    """One choice's text.

    Args:
        tokenizer: of the model.
        stop: stop strings; pass a `StopStrings` to share the automaton among choices.
        include_stop: the stop string that ended the output is part of it.
        eos_token_ids: never rendered; the request's stop_token_ids belong here too.
        min_tokens: stop strings that begin within this many first tokens end nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] | StopStrings = (),
        include_stop: bool = False,
        eos_token_ids: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer()
        self._matcher = StopMatcher(stop if isinstance(stop, StopStrings) else StopStrings(stop))
        self._include_stop = include_stop
        self._silent = frozenset(eos_token_ids)
        self._min_tokens = min_tokens
        self._pending: deque[_Pending] = deque()
        self._num_pushed = 0
        self._num_chars = 0
        self._num_chars_out = 0
        self._is_stopped = False
        self.num_delivered_tokens = 0

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TextLogprob] = ()) -> TextIncrement:
        """Takes the next tokens, with one log-probability each or none at all. After a stop string nothing counts."""
        start = self._num_chars_out
        texts = []
        for position, token_id in enumerate(token_ids):
            if self._is_stopped:
                break
            texts.append(self._push_token(token_id, logprobs[position] if logprobs else None))
        return self._increment("".join(texts), start)

    def finish(self) -> TextIncrement:
        """What was held back, when no more tokens come: text that did not become a stop string, half characters."""
        if self._is_stopped:
            return TextIncrement(is_stopped=True)
        start = self._num_chars_out
        rest = self._detokenizer.finish()
        self._num_chars += len(rest)
        text = self._match(rest)
        if not self._is_stopped:
            text += self._matcher.finish()
        self._num_chars_out = self._num_chars
        return self._increment(text, start)

    def _push_token(self, token_id: int, logprob: TextLogprob | None) -> str:
        characters = self._detokenizer.push(self._bytes(token_id))
        self._num_chars += len(characters)
        self._num_pushed += 1
        end = self._num_chars + self._detokenizer.has_partial
        self._pending.append(_Pending(token_id, logprob, self._num_chars, end))
        if self._num_pushed <= self._min_tokens:
            self._num_chars_out = self._num_chars
            return characters
        text = self._match(characters)
        self._num_chars_out = self._num_chars if self._is_stopped else self._num_chars_out + len(text)
        return text

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._silent or self._tokenizer.is_hidden(token_id):
            return b""
        return self._tokenizer.decode_bytes(token_id)

    def _match(self, characters: str) -> str:
        scan = self._matcher.push(characters)
        if scan.stop is None:
            return scan.text
        self._is_stopped = True
        return scan.text + scan.stop if self._include_stop else scan.text

    def _increment(self, text: str, start: int) -> TextIncrement:
        """`start`: number of characters of the output before `text`."""
        delivered = []
        while self._pending and (self._is_stopped or self._pending[0].end <= self._num_chars_out):
            delivered.append(self._pending.popleft())
        self.num_delivered_tokens += len(delivered)
        return TextIncrement(
            text,
            tuple([token.token_id for token in delivered]),
            tuple([token.logprob for token in delivered if token.logprob is not None]),
            tuple([min(token.num_chars - start, len(text)) for token in delivered]),  # a stop string is in no text
            self._is_stopped,
        )
