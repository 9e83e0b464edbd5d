"""How attention computes, where the operator has a choice."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """None of these changes what is computed, only how."""

    score_bytes: int = 64 << 20
    """Most memory for index scores at a time."""
    expand_from: int | None = None
    """New tokens of one sequence from which its attention takes the expanded form, where it sees all tokens."""
