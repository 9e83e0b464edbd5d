"""Triton's interpreter, without what takes a third of its time and changes nothing."""

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """Let a launch put interpreted functions in the language's place once for each module.

    As it comes, every call of one compiled function by another looks through all of `triton.language` for what it could
    still replace, and finds nothing.
    """
    patch: Callable[..., Any] = interpreter._patch_lang
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        is_launch = not patched
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        scope = patch(fn)
        if is_launch:
            scope.restore = restoring(scope.restore)
        return scope

    def restoring(restore: Callable[[], None]) -> Callable[[], None]:
        def restored() -> None:
            patched.clear()
            restore()

        return restored

    interpreter._patch_lang = patch_lang
