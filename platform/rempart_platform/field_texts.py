"""What fields of a dataclass are for: the strings that stand below them in its source, as help for flags."""

import ast
import inspect
from itertools import pairwise
from textwrap import dedent


def field_texts(of: type) -> dict[str, str]:
    """The text of each field that has one, on one line."""
    (written,) = ast.parse(dedent(inspect.getsource(of))).body
    assert isinstance(written, ast.ClassDef)
    texts = {}
    for statement, below in pairwise(written.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            texts[ast.unparse(statement.target)] = " ".join(ast.literal_eval(below.value).split())
    return texts
