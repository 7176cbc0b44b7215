"""Sums of rows, which is what a residual stream is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from hardware.engine.plan import Interval
from hardware.engine.rows import Array


def integers_for(bound: Interval) -> type[np.signedinteger]:
    """16 bits where they hold the values, else 32."""
    return np.int16 if bound.magnitude < 2**15 else np.int32


def add_rows(
    addends: Sequence[Array], shifts: Sequence[int], dtype: type[np.signedinteger]
) -> Array:
    """`sum(addend << shift)` of rows [T or 1, B, R, E], as `dtype`, which holds it."""
    steps = max(len(addend) for addend in addends)
    total = np.zeros((steps, *addends[0].shape[1:]), dtype)
    for addend, shift in zip(addends, shifts, strict=True):
        if addend.dtype == np.bool_:
            addend = addend.view(np.uint8)
        _add(addend, shift, total)
    return total


@numba.njit(parallel=True, cache=True)
def _add(addend, shift, total):
    steps, images, rows, width = total.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        source, target = addend[t % len(addend), b], total[t, b]
        for r in range(rows):
            given, held = source[r], target[r]
            for e in range(width):
                held[e] += given[e] << shift
