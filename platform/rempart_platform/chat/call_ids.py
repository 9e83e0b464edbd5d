"""Ids and numbers of the tool calls that an answer makes."""

import secrets
from collections.abc import Callable

from rempart_platform.chat.output import ToolCallStart


def mint_call_id() -> str:
    """96 random bits: a result that names it can only be meant for it."""
    return f"call_{secrets.token_hex(12)}"


class CallCounter:
    """Numbers the calls of one answer from 0."""

    def __init__(self, mint_id: Callable[[], str]) -> None:
        self._mint_id = mint_id
        self._num_calls = 0

    def start(self, name: str) -> ToolCallStart:
        """The next call."""
        self._num_calls += 1
        return ToolCallStart(self._num_calls - 1, self._mint_id(), name)
