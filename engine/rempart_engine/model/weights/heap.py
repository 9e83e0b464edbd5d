"""Memory that is freed while a model is loaded is given back, not kept in pieces."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD = -1  # names and numbers of glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_APART = 1 << 20
_USUAL = 32 << 20
"""Up to which size glibc itself, in time, serves pieces from its heap."""


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within, pieces from 1 MiB on are mapped one by one, so that freeing one gives it back to the system.

    Loading frees a weight as read each time it has made the layer from it. glibc's heap before 2.38 cannot put the
    next one into such a hole, as torch asks for aligned memory, and a model of many equal weights ends up twice its
    size. Afterwards the heap is used again, for what each step allocates would be slow to map. Elsewhere than on
    glibc nothing is changed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _USUAL)
        set_option(_M_TRIM_THRESHOLD, 2 * _USUAL)
