"""Lists of the values that are not 0, which is all that the synapses of a layer look at.

Values are kept as rows, [S, B, R, E]: R tokens or pixels of E channels. A row of a map lists its
entries as `column * E + channel`, so that the pixels under one row of a convolution's window lie
next to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from hardware.engine import buffers
from hardware.engine.plan import Interval
from hardware.engine.vectors import list_eight_bytes, list_eight_shorts, places_of_bits

Array = npt.NDArray[Any]
UNROLLED_UP_TO = 16
"""Values up to this are listed as so many spikes; larger ones keep their value."""
_SPARE = 8
_PLACES = places_of_bits()


@dataclass(frozen=True)
class EventLists:
    """What arrives, row by row, int32 all.

    Attributes:
        index: [S, B, room], entries of all rows of a step and image, one after the other.
        value: the same of their values; of no length where every entry is one spike.
        starts: [S, B, R + 1], where the entries of each row begin.
    """

    index: npt.NDArray[np.int32]
    value: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]

    @property
    def graded(self) -> bool:
        """Whether entries have values."""
        return self.value.size > 0


def are_unrolled(values: Interval, shift: int) -> bool:
    """Whether such values are listed as spikes."""
    return values.low >= 0 and values.high >> shift <= UNROLLED_UP_TO


def list_events(
    rows: Array,
    width: int,
    gate: npt.NDArray[np.bool_] | None,
    values: Interval,
    shift: int,
    room: int | None = None,
) -> EventLists:
    """List the values of rows [S, B, R, E].

    Args:
        rows: bool, or integers.
        width: pixels of a line of the map, 1 for tokens.
        gate: bool [S, B, R]: rows to leave out, or None.
        values: range that they cannot leave.
        shift: they are listed divided by 2^shift, which divides all of them.
        room: at least the entries of a step and image; by default as many as there can be.
    """
    steps, images, count, _ = rows.shape
    closed = np.zeros((0, images, count), np.bool_) if gate is None else gate
    if steps == 1 and len(closed) > 1:
        closed = closed.any(axis=0, keepdims=True)  # what stands still is listed once for all steps
    starts = buffers.empty((steps, images, count + 1), np.int32)
    unrolled = are_unrolled(values, shift)
    if room is None:
        room = count * rows.shape[3] * (values.high >> shift if unrolled else 1)
    index = buffers.empty((steps, images, room + _SPARE), np.int32)
    value = np.empty((steps, images, 0), np.int32)
    rows = np.ascontiguousarray(rows)
    if rows.dtype == np.bool_:
        _list_spikes(rows.view(np.uint8), width, closed, _PLACES, index, starts)
    elif unrolled:
        shorts = rows.astype(np.int16, copy=False)
        _list_repeats(shorts, width, closed, shift, _PLACES, index, starts)
    else:
        value = buffers.empty(index.shape, np.int32)
        _list_values(rows, width, closed, shift, index, value, starts)
    return EventLists(index, value, starts)


@numba.njit(parallel=True, cache=True)
def _list_spikes(rows, width, gate, table, index, starts):
    steps, images, count, channels = rows.shape
    eights = channels // 8 * 8
    table_at = np.int64(table.ctypes.data)
    for unit in numba.prange(steps * images):
        t, b = unit // images, unit % images
        listed, image = index[t, b], rows[t, b]
        listed_at, address = np.int64(listed.ctypes.data), np.int64(image.ctypes.data)
        found = np.int64(0)
        for r in range(count):
            starts[t, b, r] = found
            if len(gate) and not gate[t % len(gate), b, r]:
                continue
            first, at = (r % width) * channels, address + r * channels
            for c in range(0, eights, 8):
                found += list_eight_bytes(at + c, 1, first + c, table_at, listed_at + 4 * found)
            for c in range(eights, channels):
                listed[found] = first + c
                found += image[r, c]
        starts[t, b, count] = found


@numba.njit(parallel=True, cache=True)
def _list_repeats(rows, width, gate, shift, table, index, starts):
    """A value of n is listed n times: those of at least 1, then those of at least 2, ..."""
    steps, images, count, channels = rows.shape
    eights = channels // 8 * 8
    table_at = np.int64(table.ctypes.data)
    for unit in numba.prange(steps * images):
        t, b = unit // images, unit % images
        listed, image = index[t, b], rows[t, b]
        listed_at, address = np.int64(listed.ctypes.data), np.int64(image.ctypes.data)
        found = np.int64(0)
        for r in range(count):
            starts[t, b, r] = found
            if len(gate) and not gate[t % len(gate), b, r]:
                continue
            first, at = (r % width) * channels, address + 2 * r * channels
            for level in range(1, (_largest(image[r]) >> shift) + 1):
                limit = level << shift
                for c in range(0, eights, 8):
                    found += list_eight_shorts(
                        at + 2 * c, limit, first + c, table_at, listed_at + 4 * found
                    )
                for c in range(eights, channels):
                    listed[found] = first + c
                    found += image[r, c] >= limit
        starts[t, b, count] = found


@numba.njit(cache=True)
def _largest(row):
    largest = row[0]
    for c in range(len(row)):
        largest = max(largest, row[c])
    return largest


@numba.njit(parallel=True, cache=True)
def _list_values(rows, width, gate, shift, index, value, starts):
    steps, images, count, channels = rows.shape
    for unit in numba.prange(steps * images):
        t, b = unit // images, unit % images
        listed, held = index[t, b], value[t, b]
        found = np.int64(0)
        for r in range(count):
            starts[t, b, r] = found
            if len(gate) and not gate[t % len(gate), b, r]:
                continue
            row = rows[t, b, r]
            first = (r % width) * channels
            for c in range(channels):
                listed[found] = first + c
                held[found] = row[c] >> shift
                found += row[c] != 0
        starts[t, b, count] = found
