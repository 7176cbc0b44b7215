"""Freed memory is kept for the next step instead of going back to the system.

A training step frees hundreds of megabytes and allocates them again a moment later. By default
glibc maps and unmaps each large block, and the system clears every page anew: a fifth of a small
model's step was spent there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h of glibc, and its defaults
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = ((_TRIM_THRESHOLD, 128 * 1024), (_MMAP_MAX, 65536))
_KEEP = ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0))


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it the process keeps what it frees; at the end it gives back what is free.

    Without glibc nothing changes.
    """
    library = ctypes.CDLL(None)
    known = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    if known:
        _set(library, _KEEP)
    try:
        yield
    finally:
        if known:
            _set(library, _DEFAULTS)
            library.malloc_trim(ctypes.c_size_t(0))


def _set(library: ctypes.CDLL, options: tuple[tuple[int, int], ...]) -> None:
    for option, value in options:
        library.mallopt(ctypes.c_int(option), ctypes.c_int(value))
