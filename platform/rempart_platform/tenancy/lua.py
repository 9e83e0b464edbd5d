"""The Lua scripts of this package: one file is one transition, which Redis runs as a whole or not at all.

`ledger.lua` holds the functions that those of the ledger share, `queue_common.lua` those of the fair queue; Redis has
no `require`, so it is put before each text.
"""

import hashlib
from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text and the SHA-1 by which Redis knows it."""

    name: str
    text: str = field(repr=False)
    sha1: str


def load_script(name: str, *, shared: str = "ledger", runs_when_memory_is_full: bool = False) -> Script:
    """Reads `scripts/<name>.lua`.

    Args:
        shared: name of the text that is put before it; "" for none.
        runs_when_memory_is_full: for scripts that give back or settle; without them a full Redis could not recover.
    """
    folder = resources.files("rempart_platform.tenancy") / "scripts"
    flags = "#!lua flags=allow-oom\n" if runs_when_memory_is_full else "#!lua\n"
    text = flags + "".join((folder / f"{part}.lua").read_text() for part in (shared, name) if part)
    # SHA-1 is Redis's name for a script, not a protection.
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
