"""Event-driven products: each non-zero input adds its row of 8-bit weights to the accumulators.

Weights of a mixed-sign synapse are even, so half of each fits 8 bits; the sums are doubled on the
way out. Sums are kept modulo 2^16 where the layer's bound proves that the last one fits, else
modulo 2^32: what the sums in between do is then no matter, and the result is exact.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ROWS = 64
_TILE = 2048


class NarrowWeights:
    """Weights [inputs, outputs] as int8, and the accumulator that holds their sums.

    Attributes:
        rows: int8 [inputs, outputs]; `factor` times them are the weights.
        accumulator: int16 if every final sum divided by the factor fits it, else int32.
    """

    def __init__(self, weights: Array, largest_sum: int) -> None:
        self.factor = 2 if not (weights & 1).any() else 1
        self.rows = np.ascontiguousarray(weights // self.factor, dtype=np.int8)
        narrow = largest_sum // self.factor < 2**15
        self.accumulator = np.zeros(0, np.int16 if narrow else np.int32)

    @staticmethod
    def fits(weights: Array) -> bool:
        """True if the weights, or all their halves, are 8-bit integers."""
        if not weights.size:
            return False
        half = 1 if (weights & 1).any() else 2
        return int(weights.min()) >= -128 * half and int(weights.max()) <= 127 * half


def sum_rows(values: Array, rows: npt.NDArray[np.int64], weights: NarrowWeights) -> Array:
    """`values @ weights` for some rows of values; the others give zero.

    Args:
        values: bool or int32 [R, inputs], contiguous.
        rows: which rows, ascending.
        weights: of the layer.

    Returns:
        int32 [R, outputs].
    """
    shape = len(values), weights.rows.shape[1]
    out = np.empty(shape, np.int32) if len(rows) == len(values) else np.zeros(shape, np.int32)
    graded = values.dtype != np.bool_
    _sum_rows(values, rows, weights.rows, weights.accumulator, weights.factor, graded, out)
    return out


@numba.njit(parallel=True, cache=True)
def _sum_rows(values, rows, weight, like, factor, graded, out):
    inputs, outputs = weight.shape
    for chunk in numba.prange((len(rows) + _ROWS - 1) // _ROWS):
        first = chunk * _ROWS
        count = min(len(rows) - first, _ROWS)
        total = np.empty(min(outputs, _TILE), like.dtype)
        index = np.empty((count, inputs + 1), np.int32)
        found = np.empty(count, np.int64)
        for r in range(count):
            found[r] = active(values[rows[first + r]], index[r])
        for low in range(0, outputs, _TILE):
            high = min(low + _TILE, outputs)
            part = total[: high - low]
            for r in range(count):
                row = rows[first + r]
                part[:] = 0
                if graded:
                    add_graded(part, weight, index[r, : found[r]], values[row], low, high)
                else:
                    add_spikes(part, weight, index[r, : found[r]], low, high)
                for o in range(high - low):
                    out[row, low + o] = np.int32(part[o]) * factor


@numba.njit(cache=True)
def active(row, index):
    """Write the places of the non-zero entries to `index` (one longer than the row); how many."""
    found = 0
    for i in range(len(row)):
        index[found] = i
        found += row[i] != 0
    return found


@numba.njit(cache=True)
def add_spikes(total, weight, index, low, high):
    """Add the rows `index` of the weights, four at a time."""
    fours = len(index) // 4 * 4
    for k in range(0, fours, 4):
        a = weight[index[k], low:high]
        b = weight[index[k + 1], low:high]
        c = weight[index[k + 2], low:high]
        d = weight[index[k + 3], low:high]
        for o in range(len(total)):
            total[o] += a[o] + b[o] + c[o] + d[o]
    for k in range(fours, len(index)):
        a = weight[index[k], low:high]
        for o in range(len(total)):
            total[o] += a[o]


@numba.njit(cache=True)
def add_graded(total, weight, index, values, low, high):
    """Add the rows `index` of the weights, each times its value, two at a time."""
    twos = len(index) // 2 * 2
    for k in range(0, twos, 2):
        a = weight[index[k], low:high]
        b = weight[index[k + 1], low:high]
        x = total.dtype.type(values[index[k]])
        y = total.dtype.type(values[index[k + 1]])
        for o in range(len(total)):
            total[o] += a[o] * x + b[o] * y
    for k in range(twos, len(index)):
        a = weight[index[k], low:high]
        x = total.dtype.type(values[index[k]])
        for o in range(len(total)):
            total[o] += a[o] * x
