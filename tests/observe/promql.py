"""What a PromQL expression reads, without a parser of the whole language: its selectors, ranges left out.

rate(a{x="1"}[5m]) / on (y) group_left () b   ──►   a{x="1"}, b
"""

import re
from collections.abc import Iterator

_TOKENS = re.compile(
    r"""
    (?P<clause>\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\))
  | (?P<text>"[^"]*"|'[^']*')
  | (?P<range>\[[^\]]*\])
  | (?P<number>\b\d[\w.]*)
  | (?P<function>[a-zA-Z_]\w*\s*(?=\())
  | (?P<word>\b(?:and|or|unless|bool|offset|inf|nan)\b)
  | (?P<bare_aggregation>\b(?:sum|min|max|avg|count|group)\b(?=\s*(?:by|without)\b))
  | (?P<selector>[a-zA-Z_:][\w:]*(?:\{[^}]*\})?)
    """,
    re.VERBOSE | re.IGNORECASE,
)


def selectors(expr: str) -> Iterator[str]:
    """Every selector of an expression, with its matchers."""
    for found in _TOKENS.finditer(expr):
        if found.lastgroup == "selector":
            yield found.group()


def metric_of(selector: str) -> str:
    return selector.partition("{")[0]
