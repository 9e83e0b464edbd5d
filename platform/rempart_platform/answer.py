"""A choice's text to deltas of text, reasoning and tool calls, each with the tokens that it completes.

    text, token by token ─► OutputParser ─► parts ─► deltas: neighbours of one kind together
                                └ marks and what may become one: their tokens wait for the next part

Which delta a token comes in depends on the output alone, not on how it was cut into pieces on its way.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rempart_platform.chat.output import (
    ContentText,
    OutputParser,
    OutputPart,
    ReasoningText,
    ToolCallArguments,
    ToolCallStart,
)
from rempart_platform.generation import Delta, TextLogprob, ToolCallDelta
from rempart_platform.text.assembler import TextIncrement


@dataclass(slots=True)
class _Tokens:
    """Tokens with one log-probability each, or none at all."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)

    def move_to(self, other: "_Tokens") -> None:
        other.ids += self.ids
        other.logprobs += self.logprobs
        self.ids, self.logprobs = [], []


@dataclass(slots=True)
class _Draft:
    """A delta to be: parts of one kind."""

    kind: type[ContentText | ReasoningText | ToolCallDelta]
    texts: list[str] = field(default_factory=list)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    tokens: _Tokens = field(default_factory=_Tokens)

    def add(self, part: OutputPart) -> None:
        match part:
            case ContentText() | ReasoningText():
                self.texts.append(part.text)
            case ToolCallStart():
                self.tool_calls.append(ToolCallDelta(part.index, part.id, part.name))
            case ToolCallArguments():
                self._add_arguments(part)

    def _add_arguments(self, part: ToolCallArguments) -> None:
        last = self.tool_calls[-1] if self.tool_calls else None
        if last is not None and last.index == part.index and last.arguments:
            self.tool_calls[-1] = ToolCallDelta(part.index, arguments=last.arguments + part.text)
        else:
            self.tool_calls.append(ToolCallDelta(part.index, arguments=part.text))

    def delta(self, choice: int) -> Delta:
        text, token_ids, logprobs = "".join(self.texts), tuple(self.tokens.ids), tuple(self.tokens.logprobs)
        if self.kind is ContentText:
            return Delta(choice, text, token_ids, logprobs)
        if self.kind is ReasoningText:
            return Delta(choice, "", token_ids, logprobs, reasoning=text)
        return Delta(choice, "", token_ids, logprobs, tool_calls=tuple(self.tool_calls))


class PlainAnswer:
    """An answer whose text is content as it is."""

    has_tool_calls = False
    is_over = False

    def __init__(self, choice: int) -> None:
        self._choice = choice

    def push(self, increment: TextIncrement) -> list[Delta]:
        """The text."""
        return [Delta(self._choice, increment.text, increment.token_ids, increment.logprobs)] if increment else []

    def finish(self) -> list[Delta]:
        """Nothing is ever held back."""
        return []


class ParsedAnswer:
    """An answer that its chat format's parser takes apart.

    Args:
        choice: which.
        parser: fresh, of this choice alone.
        max_tool_calls: before it makes more, the answer is over; what comes then is dropped.
    """

    def __init__(self, choice: int, parser: OutputParser, max_tool_calls: int | None = None) -> None:
        self._choice = choice
        self._parser = parser
        self._max_tool_calls = max_tool_calls
        self._waiting = _Tokens()
        self.has_tool_calls = False
        self.is_over = False

    def push(self, increment: TextIncrement) -> list[Delta]:
        """What is certain after this text."""
        drafts: list[_Draft] = []
        start = 0
        for position, end in enumerate(increment.ends):
            if self.is_over:
                return self._deltas(drafts)
            self._waiting.ids.append(increment.token_ids[position])
            self._waiting.logprobs += increment.logprobs[position : position + 1]
            self._read(increment.text[start:end], drafts)
            start = end
        self._read(increment.text[start:], drafts)  # begins a token that is not whole yet
        return self._deltas(drafts)

    def finish(self) -> list[Delta]:
        """What the parser held back, now that no more text comes; tokens without text last."""
        drafts: list[_Draft] = []
        if not self.is_over:
            self._add(self._parser.finish(), drafts)
        deltas = self._deltas(drafts)
        if self._waiting.ids:
            deltas.append(Delta(self._choice, "", tuple(self._waiting.ids), tuple(self._waiting.logprobs)))
        return deltas

    def _read(self, text: str, drafts: list[_Draft]) -> None:
        if text and not self.is_over:
            self._add(self._parser.push(text), drafts)

    def _add(self, parts: Iterable[OutputPart], drafts: list[_Draft]) -> None:
        has_new = False
        for part in parts:
            if isinstance(part, ToolCallStart):
                if self._max_tool_calls is not None and part.index >= self._max_tool_calls:
                    self.is_over = True
                    break
                self.has_tool_calls = True
            elif not part.text:
                continue
            kind = _kind(part)
            if not drafts or drafts[-1].kind is not kind:
                drafts.append(_Draft(kind))
            drafts[-1].add(part)
            has_new = True
        if has_new:
            self._waiting.move_to(drafts[-1].tokens)

    def _deltas(self, drafts: list[_Draft]) -> list[Delta]:
        return [draft.delta(self._choice) for draft in drafts]


def _kind(part: OutputPart) -> type[ContentText | ReasoningText | ToolCallDelta]:
    match part:
        case ContentText():
            return ContentText
        case ReasoningText():
            return ReasoningText
        case ToolCallStart() | ToolCallArguments():
            return ToolCallDelta
