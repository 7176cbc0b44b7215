"""Memory for the arrays of a batch, used again by the next.

The system hands out fresh memory page by page, and clears each page: for a network of many small
layers that costs more than some of the layers. A block is free again once nothing refers to it, nor
to any view of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SMALLEST = 2**16
"""Arrays of fewer bytes come from the system."""
_WASTE = 4
"""A block serves arrays down to this part of it."""


class Buffers:
    """Blocks of memory, kept as long as this object lives."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.uint8]] = []

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """A block of at least `size` bytes that nobody uses; what it holds is of no meaning."""
        for block in self._blocks:  # sorted, so the first that fits is the smallest
            # a free block is known to the list, to `block`, and to the call that counts
            if size <= len(block) <= _WASTE * size and sys.getrefcount(block) == 3:
                return block
        block = np.empty(size, np.uint8)
        self._blocks.append(block)
        self._blocks.sort(key=len)
        return block


_current: ContextVar[Buffers | None] = ContextVar("buffers", default=None)


@contextmanager
def using(buffers: Buffers | None) -> Iterator[None]:
    """Inside, `empty` and `zeros` take memory from these buffers (None: from the system)."""
    token = _current.set(buffers)
    try:
        yield
    finally:
        _current.reset(token)


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """As `numpy.empty`."""
    buffers, kind = _current.get(), np.dtype(dtype)
    count = 1
    for length in shape:
        count *= length
    size = count * kind.itemsize
    if buffers is None or size < SMALLEST:
        return np.empty(shape, kind)
    return buffers.take(size)[:size].view(kind).reshape(shape)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """As `numpy.zeros`."""
    buffers = _current.get()
    if buffers is None:
        return np.zeros(shape, dtype)
    array = empty(shape, dtype)
    array.fill(0)
    return array
