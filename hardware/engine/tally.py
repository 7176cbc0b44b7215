"""Counts over the values of a layer, in one pass each, per image."""

from __future__ import annotations

import numba
import numpy as np

MESSAGES, SYNAPSES, UNROLLED, GRADED = range(4)
"""Columns: non-zero values; them, their spikes and the graded among them, times their fan-out."""


@numba.njit(parallel=True, cache=True)
def tally_spikes(words, gate, found):
    """Count spikes, eight at a time.

    Args:
        words: bool [S, B, R, E] seen as uint64 [S, B, R, E / 8].
        gate: bool [G, B, R]: rows to leave out; of length 0: none. S or G may be 1.
        found: int64 [B], filled.
    """
    _, images, rows, _ = words.shape
    for b in numba.prange(images):
        total = np.int64(0)
        for t in range(max(len(words), len(gate))):
            for r in range(rows):
                if len(gate) == 0 or gate[t % len(gate), b, r]:
                    total += _ones(words[t % len(words), b, r])
        found[b] = total


@numba.njit(cache=True)
def _ones(words):
    """Sum of the bytes, each 0 or 1; 255 words add up in their eight bytes without a carry."""
    found = np.uint64(0)
    even = np.uint64(0x00FF00FF00FF00FF)
    for first in range(0, len(words), 255):
        total = np.uint64(0)
        part = words[first : first + 255]
        for w in range(len(part)):
            total += part[w]
        pairs = (total & even) + ((total >> np.uint64(8)) & even)
        found += (pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)
    return np.int64(found)


@numba.njit(parallel=True, cache=True)
def tally_places(values, found):
    """How often each place of bool [S, B, R, E], seen as uint8, holds a spike: int32 [B, E]."""
    steps, images, rows, width = values.shape
    for b in numba.prange(images):
        place = found[b]
        place[:] = 0
        for t in range(steps):
            for r in range(rows):
                row = values[t, b, r]
                for e in range(width):
                    place[e] += np.int32(row[e])


@numba.njit(parallel=True, cache=True)
def tally_graded(values, gate, fan_out, unit, counts):
    """Count integers, int32 or int64, of which `unit` (a power of 2) stands for one spike.

    Args:
        values: [S, B, R, E].
        gate: as above.
        fan_out: int64 [E], or of length 1: the same for all.
        unit: value of one spike.
        counts: int64 [B, 4], filled.
    """
    _, images, rows, _ = values.shape
    steps = max(len(values), len(gate))
    shared = len(fan_out) == 1
    for b in numba.prange(images):
        found = np.zeros(4, np.int64)
        for t in range(steps):
            for r in range(rows):
                if len(gate) and not gate[t % len(gate), b, r]:
                    continue
                row = values[t % len(values), b, r]
                if shared:
                    _count_row(row, fan_out[0], unit, found)
                else:
                    _count_places(row, fan_out, unit, found)
        counts[b] = found


@numba.njit(cache=True)
def _count_row(row, fan_out, unit, found):
    messages = graded = np.int32(0)
    unrolled = np.int64(0)
    shift = 0
    while (1 << shift) < unit:
        shift += 1
    for e in range(len(row)):
        size = abs(row[e])
        messages += np.int32(size != 0)
        unrolled += ((size - 1) >> shift) + 1  # rounded up; 0 for 0
        graded += np.int32((size != 0) & (size != unit))
    found[MESSAGES] += messages
    found[SYNAPSES] += messages * fan_out
    found[UNROLLED] += unrolled * fan_out
    found[GRADED] += graded * fan_out


@numba.njit(cache=True)
def _count_places(row, fan_out, unit, found):
    for e in range(len(row)):
        size = abs(row[e])
        if size:
            found[MESSAGES] += 1
            found[SYNAPSES] += fan_out[e]
            found[UNROLLED] += -(-size // unit) * fan_out[e]
            if size != unit:
                found[GRADED] += fan_out[e]
