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


class RowCounts(NamedTuple):
    """Of every row, int32 [S, B, R].

    Attributes:
        messages: values that are not 0.
        unrolled: the spikes that they stand for, rounded up.
        graded: values that are neither 0 nor a single spike; None: there are none.
    """

    messages: RowArray
    unrolled: RowArray
    graded: RowArray | None


def count_rows(rows: Array, unit: int) -> RowCounts:
    """Count rows [S, B, R, E] of which the value `unit` (a power of 2) stands for one spike."""
    shape = rows.shape[:3]
    if rows.dtype == np.bool_:
        return of_spikes(count_messages(rows))
    messages = buffers.empty(shape, np.int32)
    if rows.dtype not in (np.int16, np.int32, np.int64):
        rows = rows.astype(np.int32)
    unrolled, graded = buffers.empty(shape, np.int32), buffers.empty(shape, np.int32)
    if rows.dtype == np.int16 and rows.shape[3] % LANES == 0:
        _count_shorts(rows, unit, messages, unrolled, graded)
    else:
        _count_graded(rows, unit, messages, unrolled, graded)
    return RowCounts(messages, unrolled, graded)


def count_messages(rows: Array) -> RowArray:
    """How many values of each row of [S, B, R, E] are not 0."""
    messages = buffers.empty(rows.shape[:3], np.int32)
    _count_nonzero(rows.view(np.uint8) if rows.dtype == np.bool_ else rows, messages)
    return messages


def of_spikes(messages: RowArray) -> RowCounts:
    """Counts of rows of spikes, of which the number of spikes is known."""
    return RowCounts(messages, messages, None)


def sum_over_time(counts: RowArray) -> RowArray:
    """Counts [S, B, R] over all steps, int32 [B, R]."""
    return counts[0] if len(counts) == 1 else counts.sum(axis=0, dtype=np.int32)


def sum_rows(counts: RowArray, gate: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
    """Counts [S, B, R] of the rows that are open (gate [G, B, R], or None), int64 [B]."""
    steps = len(counts) if gate is None else max(len(counts), len(gate))
    total = np.zeros(counts.shape[1], np.int64)
    gates = np.zeros((0, 1, 1), np.bool_) if gate is None else gate
    _sum_rows(counts, gates, steps, total)
    return total


def sum_weighted_rows(
    counts: RowArray, gate: npt.NDArray[np.bool_] | None, weights: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The same, and the sum of `counts * weights`, where each row has its weight, int64 [R]."""
    steps = len(counts) if gate is None else max(len(counts), len(gate))
    total, weighted = np.zeros((2, counts.shape[1]), np.int64)
    gates = np.zeros((0, 1, 1), np.bool_) if gate is None else gate
    _sum_weighted_rows(counts, gates, weights, steps, total, weighted)
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
def count_image_of_shorts(rows, unit, messages, unrolled, graded):
    """Rows int16 [R, E] of one step and image, E a multiple of 32; the counts are int32 [R]."""
    count, channels = rows.shape
    shift = 0
    while (1 << shift) < unit:
        shift += 1
    address = np.int64(rows.ctypes.data)
    found = np.empty(3, np.int32)
    found_at = np.int64(found.ctypes.data)
    for r in range(count):
        count_shorts(address + 2 * r * channels, channels, shift, unit, found_at)
        messages[r] = found[0]
        unrolled[r] = found[1]
        graded[r] = found[2]


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
        for r in range(count):
            row = rows[t, b, r]
            found = spikes = several = np.int32(0)
            for c in range(channels):
                size = abs(np.int32(row[c]))
                found += np.int32(size != 0)
                spikes += np.int32(((size - np.int32(1)) >> shift) + np.int32(1))
                several += np.int32((size != 0) & (size != unit))
            messages[t, b, r] = found
            unrolled[t, b, r] = spikes
            graded[t, b, r] = several


@numba.njit(parallel=True, cache=True)
def _sum_rows(counts, gate, steps, total):
    _, images, rows = counts.shape
    for b in numba.prange(images):
        found = np.int64(0)
        for t in range(steps):
            row = counts[t % len(counts), b]
            for r in range(rows):
                if len(gate) == 0 or gate[t % len(gate), b, r]:
                    found += row[r]
        total[b] = found


@numba.njit(parallel=True, cache=True)
def _sum_weighted_rows(counts, gate, weights, steps, total, weighted):
    _, images, rows = counts.shape
    for b in numba.prange(images):
        found = met = np.int64(0)
        for t in range(steps):
            row = counts[t % len(counts), b]
            for r in range(rows):
                if len(gate) == 0 or gate[t % len(gate), b, r]:
                    found += row[r]
                    met += row[r] * weights[r]
        total[b] = found
        weighted[b] = met
