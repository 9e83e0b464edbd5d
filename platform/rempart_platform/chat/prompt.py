"""Prompts in pieces: text of people and templates, and control tags that only a chat format may place."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rempart_platform.text.tokenizer import Tokenizer

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Control:
    """A tag by its name: a special token where the tokenizer has one of that name, else the name's own text."""

    name: str


Piece = str | Control


def fill(template: str, **values: Piece) -> list[Piece]:
    """The template with a piece for each `{field}`; the pieces' own braces are left alone."""
    parts = _FIELD.split(template)
    return [values[part] if position % 2 else part for position, part in enumerate(parts)]


def encode_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer) -> list[int]:
    """Token ids. Neighbouring texts are tokenized as one, since tokens may span them.

    Raises:
        RempartError: INVALID_REQUEST when the tokenizer cannot take a text.
    """
    token_ids: list[int] = []
    text: list[str] = []
    for piece in pieces:
        special = _special_id(piece, tokenizer)
        if special is None:
            text.append(piece.name if isinstance(piece, Control) else piece)
            continue
        token_ids += [*tokenizer.encode("".join(text)), special]
        text.clear()
    return token_ids + tokenizer.encode("".join(text))


def _special_id(piece: Piece, tokenizer: Tokenizer) -> int | None:
    if not isinstance(piece, Control):
        return None
    try:
        return tokenizer.special_token_id(piece.name)
    except KeyError:
        return None
