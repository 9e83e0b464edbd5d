"""What a model thought, parted from what it answered."""

from collections.abc import Callable, Sequence

from rempart_platform.chat.deepseek_tags import END_THINK, THINK
from rempart_platform.chat.marks import cut_at_first
from rempart_platform.chat.output import ContentText, OutputParser, OutputPart, ReasoningText


class PlainAnswer:
    """An answer that is content as it is."""

    def push(self, text: str) -> Sequence[OutputPart]:
        """All of it."""
        return [ContentText(text)] if text else []

    def finish(self) -> Sequence[OutputPart]:
        """Nothing was held back."""
        return []


class ReasoningParser:
    """Reasoning up to `</think>`, then the answer.

    A tag counts only where the format has a place for it: `</think>` ends reasoning; at the beginning of reasoning or
    of the answer, a tag that repeats what the prompt ended with is dropped, and `<think>` begins reasoning after all.
    Anywhere else the model speaks of tags, which is text.

    Args:
        is_thinking: the prompt ended inside of a think block.
        answer: reads what is no reasoning.
        ends_at: what ends reasoning just as `</think>` does, and is part of the answer.
    """

    def __init__(self, is_thinking: bool, answer: OutputParser | None = None, ends_at: Sequence[str] = ()) -> None:
        self._answer = answer or PlainAnswer()
        self._ends = (END_THINK.name, *ends_at)
        self._held = ""
        self._is_thinking = is_thinking
        self._step: Callable[[], Sequence[OutputPart] | None] = self._begin

    def push(self, text: str) -> Sequence[OutputPart]:
        """Parts that are certain after this text."""
        self._held += text
        parts: list[OutputPart] = []
        while (more := self._step()) is not None:
            parts += more
        return parts

    def finish(self) -> Sequence[OutputPart]:
        """What was held back is no tag."""
        rest, self._held = self._held, ""
        return [*self._said(rest), *self._answer.finish()]

    def _begin(self) -> Sequence[OutputPart] | None:
        """At the beginning of reasoning or of the answer, with nothing but whitespace before."""
        start = self._held.lstrip()
        for tag in (THINK.name, END_THINK.name):
            if start.startswith(tag):
                self._is_thinking = tag == THINK.name
                self._held = start.removeprefix(tag)
                return []
            if tag.startswith(start):
                return None
        self._step = self._reason if self._is_thinking else self._pass_on
        return []

    def _reason(self) -> Sequence[OutputPart] | None:
        cut = cut_at_first(self._held, self._ends)
        parts = self._said(cut.before)
        self._held = cut.after
        if cut.mark is None:
            return parts or None
        self._is_thinking = False
        if cut.mark == END_THINK.name:
            self._step = self._begin
        else:
            self._held = cut.mark + cut.after
            self._step = self._pass_on
        return parts

    def _pass_on(self) -> Sequence[OutputPart] | None:
        text, self._held = self._held, ""
        return self._said(text) if text else None

    def _said(self, text: str) -> Sequence[OutputPart]:
        if not self._is_thinking:
            return self._answer.push(text)
        return [ReasoningText(text)] if text else []
