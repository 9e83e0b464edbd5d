"""Find marks in text that comes in pieces, giving out all text that cannot be part of one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """A text up to its first mark. Without one, `after` is what may become the beginning of one."""

    before: str
    mark: str | None
    after: str


def cut_at_first(text: str, marks: Sequence[str]) -> Cut:
    """Cuts where a mark is whole first. No mark may be the beginning of another."""
    found = [(position, mark) for mark in marks if (position := text.find(mark)) >= 0]
    if found:
        position, mark = min(found)
        return Cut(text[:position], mark, text[position + len(mark) :])
    end = len(text) - _num_held(text, marks)
    return Cut(text[:end], None, text[end:])


class MarkScanner:
    """Splits text into marks and what is between them."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = tuple(marks)
        self._held = ""

    def push(self, text: str) -> Iterator[str]:
        """Whole marks, and pieces of text without any."""
        rest: str | None = self._held + text
        while rest is not None:
            cut = cut_at_first(rest, self._marks)
            self._held = cut.after
            yield from filter(None, (cut.before, cut.mark))
            rest = cut.after if cut.mark else None

    def finish(self) -> str:
        """The text held back: it has not become a mark."""
        held, self._held = self._held, ""
        return held


def _num_held(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a mark."""
    end = text[1 - max(len(mark) for mark in marks) :]
    if not any(mark[0] in end for mark in marks):
        return 0
    lengths = range(len(end), 0, -1)
    return next((length for length in lengths if any(mark.startswith(end[-length:]) for mark in marks)), 0)
