"""Counts over rows of values, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from hardware.engine import buffers
from hardware.engine.rows import Array
from hardware.engine.vectors import LANES, count_shorts

RowArray = npt.NDArray[np.int32]
PerImage = npt.NDArray[np.int64]


class RowCounts(NamedTuple):
    """Of every row, int32 [S, B, R].

    Attributes:
        messages: values that are not 0.
        unrolled: the spikes that they stand for, rounded up; None: as many.
        graded: values that are neither 0 nor a single spike; None: there are none.
    """

    messages: RowArray
    unrolled: RowArray | None
    graded: RowArray | None


class Sent(NamedTuple):
    """The same of all open rows over time, int64 [B]."""

    messages: PerImage
    unrolled: PerImage | None
    graded: PerImage | None

    def times(self, count: int) -> Sent:
        """As often."""
        others = (None if part is None else part * count for part in self[1:])
        return Sent(self.messages * count, *others)


def count_rows(rows: Array, unit: int) -> RowCounts:
    """Count rows [S, B, R, E] of which the value `unit` (a power of 2) stands for one spike."""
    shape = rows.shape[:3]
    if rows.dtype == np.bool_:
        return of_spikes(count_messages(rows))
    messages = buffers.empty(shape, np.int32)
    if rows.dtype not in (np.int16, np.int32, np.int64):
        rows = rows.astype(np.int32)
    unrolled, graded = buffers.empty(shape, np.int32), buffers.empty(shape, np.int32)
    if counts_in_lanes(rows.dtype, rows.shape[3]):
        _count_shorts(rows, unit, messages, unrolled, graded)
    else:
        _count_graded(rows, unit, messages, unrolled, graded)
    return RowCounts(messages, unrolled, graded)


def counts_in_lanes(dtype: npt.DTypeLike, width: int) -> bool:
    """Whether rows are of a kind that `count_image_of_shorts` takes."""
    return dtype == np.int16 and width % LANES == 0 and width < 2**16


def count_messages(rows: Array) -> RowArray:
    """How many values of each row of [S, B, R, E] are not 0."""
    messages = buffers.empty(rows.shape[:3], np.int32)
    _count_nonzero(rows.view(np.uint8) if rows.dtype == np.bool_ else rows, messages)
    return messages


def of_spikes(messages: RowArray) -> RowCounts:
    """Counts of rows of spikes, of which the number of spikes is known."""
    return RowCounts(messages, None, None)


def sum_over_time(counts: RowArray) -> RowArray:
    """Counts [S, B, R] over all steps, int32 [B, R]."""
    return counts[0] if len(counts) == 1 else counts.sum(axis=0, dtype=np.int32)


def sent_rows(counts: RowCounts, gate: npt.NDArray[np.bool_] | None) -> Sent:
    """Sum of the counts of open rows."""
    others = (None if part is None else sum_rows(part, gate) for part in counts[1:])
    return Sent(sum_rows(counts.messages, gate), *others)


def count_closed(gate: npt.NDArray[np.bool_]) -> PerImage:
    """Closed tokens of a gate [S, B, N], int64 [B]."""
    return np.count_nonzero(~gate, axis=(0, 2)).astype(np.int64)


def sum_rows(counts: RowArray, gate: npt.NDArray[np.bool_] | None) -> PerImage:
    """Counts [S, B, R] of the rows that are open (gate [G, B, R], or None), int64 [B]."""
    steps = len(counts) if gate is None else max(len(counts), len(gate))
    total = np.zeros(counts.shape[1], np.int64)
    gates = np.zeros((0, 1, 1), np.bool_) if gate is None else gate
    _sum_rows(counts, gates, steps, total)
    return total


def sum_weighted_rows(
    counts: RowArray, gate: npt.NDArray[np.bool_] | None, weights: npt.NDArray[np.int64]
) -> tuple[PerImage, PerImage]:
    """The same, and the sum of `counts * weights`, where each row has its weight, int64 [R]."""
    steps = len(counts) if gate is None else max(len(counts), len(gate))
    total, weighted = np.zeros((2, counts.shape[1]), np.int64)
    gates = np.zeros((0, 1, 1), np.bool_) if gate is None else gate
    _sum_weighted_rows(counts, gates, weights.astype(np.int32), steps, total, weighted)
    return total, weighted


@numba.njit(parallel=True, cache=True)
def _count_nonzero(rows, messages):
    steps, images, count, channels = rows.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        for r in range(count):
            row = rows[t, b, r]
            found = np.int32(0)
            for c in range(channels):
                found += np.int32(row[c] != 0)
            messages[t, b, r] = found


@numba.njit(cache=True)
def unpacked(counts):
    """Messages, graded values and unrolled spikes, of what `count_shorts` returns."""
    return counts & 0xFFFF, (counts >> 16) & 0xFFFF, counts >> 32


@numba.njit(cache=True)
def count_image_of_shorts(rows, unit, messages, unrolled, graded):
    """Rows int16 [R, E] of one step and image, E a multiple of 32; the counts are int32 [R]."""
    count, channels = rows.shape
    shift = 0
    while (1 << shift) < unit:
        shift += 1
    address = np.int64(rows.ctypes.data)
    for r in range(count):
        found = count_shorts(address + 2 * r * channels, channels, shift, unit)
        messages[r], graded[r], unrolled[r] = unpacked(found)


@numba.njit(parallel=True, cache=True)
def _count_shorts(rows, unit, messages, unrolled, graded):
    steps, images = rows.shape[:2]
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        count_image_of_shorts(rows[t, b], unit, messages[t, b], unrolled[t, b], graded[t, b])


@numba.njit(parallel=True, cache=True)
def _count_graded(rows, unit, messages, unrolled, graded):
    steps, images, count, channels = rows.shape
    shift = 0
    while (1 << shift) < unit:
        shift += 1
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        sent, spikes, several = messages[t, b], unrolled[t, b], graded[t, b]
        if channels == 1:  # as grey pixels are: all rows in one loop
            values = rows[t, b, :, 0]
            for r in range(count):
                sent[r], spikes[r], several[r] = _weighed(values[r], shift, unit)
            continue
        for r in range(count):
            row = rows[t, b, r]
            found = whole = others = np.int32(0)
            for c in range(channels):
                one = _weighed(row[c], shift, unit)
                found += one[0]
                whole += one[1]
                others += one[2]
            sent[r] = found
            spikes[r] = whole
            several[r] = others


@numba.njit(cache=True)
def _weighed(value, shift, unit):
    """Whether a value is sent, the spikes that it stands for, whether it is not one spike."""
    size = abs(np.int32(value))
    whole = np.int32(((size - np.int32(1)) >> shift) + np.int32(1))
    return np.int32(size != 0), whole, np.int32((size != 0) & (size != unit))


# To wake a second thread would take longer than these sums do.


@numba.njit(cache=True)
def _sum_rows(counts, gate, steps, total):
    _, images, rows = counts.shape
    for b in range(images):
        found = np.int64(0)
        for t in range(steps):
            row = counts[t % len(counts), b]
            if len(gate) == 0:
                for r in range(rows):
                    found += row[r]
            else:
                is_open = gate[t % len(gate), b]
                for r in range(rows):
                    found += row[r] * np.int64(is_open[r])
        total[b] = found


@numba.njit(cache=True)
def _sum_weighted_rows(counts, gate, weights, steps, total, weighted):
    _, images, rows = counts.shape
    for b in range(images):
        found = met = np.int64(0)
        for t in range(steps):
            row = counts[t % len(counts), b]
            if len(gate) == 0:
                for r in range(rows):
                    found += row[r]
                    met += np.int64(row[r]) * np.int64(weights[r])
            else:
                is_open = gate[t % len(gate), b]
                for r in range(rows):
                    one = row[r] * np.int64(is_open[r])
                    found += one
                    met += one * weights[r]
        total[b] = found
        weighted[b] = met
