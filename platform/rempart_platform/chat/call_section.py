"""The text around an answer's calls: which of it is content, and which belongs to the calls.

Whitespace before a section of calls belongs to the section. A section that turns out to hold no call was content, to
its last character; so is everything that has no place between calls.
"""

from rempart_platform.chat.output import ContentText, OutputPart


class CallSection:
    """Outside of a section, `content`; inside of one, the others."""

    def __init__(self) -> None:
        self._held = ""
        """Not given out, and not yet known to belong to a call."""
        self._has_call = False
        """In this section, or right before."""
        self._is_content = False
        """Whether the section's opening went out as content; its closing has to follow."""

    def content(self, text: str) -> list[OutputPart]:
        """Text of the answer; its last whitespace waits for what follows."""
        self._has_call = self._has_call and not text.strip()
        return self._say(text)

    def open(self, raw: str) -> None:
        """A section begins with this text."""
        self._held += raw
        self._has_call = False
        self._is_content = False

    def hold(self, raw: str) -> None:
        """Text that belongs to a call, if it becomes one."""
        self._held += raw

    def stray(self, raw: str) -> list[OutputPart]:
        """Text that has no place here: what was held has become no call. Its last whitespace waits, as above."""
        self._is_content = self._is_content or not self._has_call
        return self._say(raw)

    def take_call(self) -> None:
        """What was held has become a call, or the next piece of one."""
        self._has_call = True
        self._held = ""

    def close(self, raw: str) -> list[OutputPart]:
        """The section ends with this text."""
        if self._is_content or not self._has_call:
            return self.stray(raw)
        self._held = ""
        return []

    def finish(self) -> list[OutputPart]:
        """The text has ended; whitespace behind calls is nothing."""
        text, self._held = self._held, ""
        return [] if self._has_call and not text.strip() else _content(text)

    def _say(self, text: str) -> list[OutputPart]:
        text = self._held + text
        end = len(text.rstrip())
        self._held = text[end:]
        return _content(text[:end])


def _content(text: str) -> list[OutputPart]:
    return [ContentText(text)] if text else []
