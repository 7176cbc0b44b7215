"""Sums of rows, which is what a residual stream is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt

from hardware.engine import buffers
from hardware.engine.plan import Interval
from hardware.engine.rows import Array
from hardware.engine.tally import (
    RowArray,
    RowCounts,
    count_image_of_shorts,
    count_rows,
    counts_in_lanes,
    unpacked,
)
from hardware.engine.vectors import add_spikes, count_shorts


def integers_for(bound: Interval) -> type[np.signedinteger]:
    """16 bits where they hold the values, else 32."""
    return np.int16 if bound.magnitude < 2**15 else np.int32


def add_rows(
    addends: Sequence[Array],
    shifts: Sequence[int],
    dtype: type[np.signedinteger],
    unit: int | None = None,
) -> tuple[Array, RowCounts | None]:
    """`sum(addend << shift)` of rows [T or 1, B, R, E], as `dtype`, which holds it.

    With a `unit`, the value of one spike, also the counts of the sums.
    """
    steps = max(len(addend) for addend in addends)
    total = buffers.empty((steps, *addends[0].shape[1:]), dtype)
    first, *others = (a.view(np.uint8) if a.dtype == np.bool_ else a for a in addends)
    if len(others) == 1 and unit is not None and counts_in_lanes(dtype, total.shape[3]):
        counts = RowCounts(*(buffers.empty(total.shape[:3], np.int32) for _ in range(3)))
        _add_two_counted(first, shifts[0], others[0], shifts[1], total, unit, *counts)
        return total, counts
    if not others:
        total[...] = first
        np.left_shift(total, shifts[0], out=total)
    else:
        _add_two(first, shifts[0], others[0], shifts[1], total)
    for addend, shift in zip(others[1:], shifts[2:], strict=True):
        _add(addend, shift, total)
    return total, None if unit is None else count_rows(total, unit)


@numba.njit(cache=True)
def _add_image(first, first_shift, second, second_shift, t, b, total):
    one, two = first[t % len(first), b].reshape(-1), second[t % len(second), b].reshape(-1)
    held = total[t, b].reshape(-1)
    for e in range(len(held)):
        held[e] = (one[e] << first_shift) + (two[e] << second_shift)


@numba.njit(parallel=True, cache=True)
def _add_two(first, first_shift, second, second_shift, total):
    steps, images, _, _ = total.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        _add_image(first, first_shift, second, second_shift, t, b, total)


@numba.njit(parallel=True, cache=True)
def _add_two_counted(
    first, first_shift, second, second_shift, total, unit, messages, unrolled, graded
):
    """Counts follow each image's sums while these are in the cache."""
    steps, images, _, _ = total.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        _add_image(first, first_shift, second, second_shift, t, b, total)
        count_image_of_shorts(total[t, b], unit, messages[t, b], unrolled[t, b], graded[t, b])


@numba.njit(parallel=True, cache=True)
def _add(addend, shift, total):
    steps, images, _, _ = total.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        given, held = addend[t % len(addend), b].reshape(-1), total[t, b].reshape(-1)
        for e in range(len(held)):
            held[e] += given[e] << shift


def join_rows(
    total: Array,
    spikes: npt.NDArray[np.bool_],
    shift: int,
    found: RowArray,
    counts: RowCounts | None,
    unit: int,
) -> RowCounts | None:
    """`total += spikes << shift` in place; rows without spikes are passed over.

    Args:
        total: integers [T, B, R, E].
        spikes: bool, of the same shape. found: spikes of each row, int32 [T, B, R].
        counts: of the rows of `total` before, with unrolled and graded, or None: not wanted.
        unit: the value that stands for one spike.

    Returns:
        The counts after.
    """
    given = spikes.view(np.uint8)
    if not counts_in_lanes(total.dtype, total.shape[3]):
        _join(total, given, shift, found)
        return None if counts is None else count_rows(total, unit)
    if counts is None:
        none = np.zeros((0, 0, 0), np.int32)
        _join_lanes(total, given, shift, found, 0, none, none, none)
        return None
    assert counts.unrolled is not None
    assert counts.graded is not None
    after = counts.messages.copy(), counts.unrolled.copy(), counts.graded.copy()
    _join_lanes(total, given, shift, found, unit.bit_length(), *after)
    return RowCounts(*after)


@numba.njit(parallel=True, cache=True)
def _join(total, given, shift, found):
    steps, images, rows, width = total.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        for r in range(rows):
            if found[t, b, r]:
                for e in range(width):
                    total[t, b, r, e] += given[t, b, r, e] << shift


@numba.njit(parallel=True, cache=True)
def _join_lanes(total, given, shift, found, unit_bits, messages, unrolled, graded):
    """Counts are made where the unit has bits."""
    steps, images, rows, width = total.shape
    total_at, given_at = np.int64(total.ctypes.data), np.int64(given.ctypes.data)
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        for r in range(rows):
            if found[t, b, r]:
                row = (item * rows + r) * width
                add_spikes(total_at + 2 * row, given_at + row, width, shift)
                if unit_bits:
                    counts = count_shorts(
                        total_at + 2 * row, width, unit_bits - 1, 1 << (unit_bits - 1)
                    )
                    messages[t, b, r], graded[t, b, r], unrolled[t, b, r] = unpacked(counts)


def sum_rows(rows: Array) -> npt.NDArray[np.int64]:
    """Sum of integers [S, B, R, E] over steps and rows, int64 [B, E]."""
    total = np.zeros((rows.shape[1], rows.shape[3]), np.int64)
    _sum_rows(rows.view(np.uint8) if rows.dtype == np.bool_ else rows, total)
    return total


@numba.njit(parallel=True, cache=True)
def _sum_rows(rows, total):
    steps, images, count, width = rows.shape
    for b in numba.prange(images):
        found = total[b]
        for t in range(steps):
            for r in range(count):
                row = rows[t, b, r]
                for e in range(width):
                    found[e] += row[e]


def sum_sized_rows(
    rows: Array, size: npt.NDArray[np.int64], unit: int
) -> tuple[npt.NDArray[np.int64], RowCounts]:
    """Sum of `rows[s, b, r] * size[s, b, r]` as in `sum_rows`, and counts of the products.

    Args:
        size: int64 [S or T, B, R], the same at every step.
        unit: the product that stands for one spike, a power of 2.
    """
    shape = rows.shape[:3]
    total = np.zeros((rows.shape[1], rows.shape[3]), np.int64)
    counts = RowCounts(*(buffers.empty(shape, np.int32) for _ in range(3)))
    values = rows.view(np.uint8) if rows.dtype == np.bool_ else rows
    _sum_sized_rows(values, np.ascontiguousarray(size[0]), unit.bit_length() - 1, total, *counts)
    return total, counts


@numba.njit(parallel=True, cache=True)
def _sum_sized_rows(rows, size, shift, total, messages, unrolled, graded):
    steps, images, count, width = rows.shape
    one = np.int32(1 << shift)
    for b in numba.prange(images):
        found = total[b]
        part = np.zeros(width, np.int32)
        for t in range(steps):
            for r in range(count):
                row, times = rows[t, b, r], np.int32(size[b, r])
                sent = spikes = several = np.int32(0)
                for e in range(width):
                    product = np.int32(row[e] * times)
                    magnitude = abs(product)
                    part[e] = product
                    sent += np.int32(magnitude != 0)
                    spikes += np.int32(((magnitude - np.int32(1)) >> shift) + np.int32(1))
                    several += np.int32((magnitude != 0) & (magnitude != one))
                for e in range(width):
                    found[e] += part[e]
                messages[t, b, r] = sent
                unrolled[t, b, r] = spikes
                graded[t, b, r] = several
