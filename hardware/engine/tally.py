"""Counts over the values of a layer, in one pass each, per image."""

from __future__ import annotations

import numba
import numpy as np

MESSAGES, SYNAPSES, UNROLLED, GRADED = range(4)
"""Columns: non-zero values; them, their spikes and the graded among them, times their fan-out."""


@numba.njit(parallel=True, cache=True)
def tally_spikes(values, gate, fan_out, counts):
    """Count spikes.

    Args:
        values: bool [S, B, R, E].
        gate: bool [G, B, R]: rows to leave out; of length 0: none. S or G may be 1.
        fan_out: int64 [E], or of length 1: the same for all.
        counts: int64 [B, 4], filled; a spike is never graded.
    """
    _, images, rows, width = values.shape
    steps = max(len(values), len(gate))
    for b in numba.prange(images):
        messages, synapses = np.int64(0), np.int64(0)
        for t in range(steps):
            for r in range(rows):
                if len(gate) and not gate[t % len(gate), b, r]:
                    continue
                row = values[t % len(values), b, r]
                found = np.int32(0)
                for e in range(width):
                    found += np.int32(row[e])
                messages += found
                if len(fan_out) == 1:
                    synapses += found * fan_out[0]
                elif found:
                    for e in range(width):
                        synapses += fan_out[e] if row[e] else 0
        counts[b, MESSAGES] = messages
        counts[b, SYNAPSES] = counts[b, UNROLLED] = synapses
        counts[b, GRADED] = 0


@numba.njit(parallel=True, cache=True)
def tally_graded(values, gate, fan_out, unit, counts):
    """Count integers, int32 or int64, of which `unit` stands for one spike; else as above."""
    _, images, rows, width = values.shape
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
    messages, unrolled, graded = np.int64(0), np.int64(0), np.int64(0)
    shift = 0
    while (1 << shift) < unit:
        shift += 1
    for e in range(len(row)):
        size = abs(row[e])
        messages += size != 0
        unrolled += ((size - 1) >> shift) + 1  # rounded up; 0 for 0
        graded += (size != 0) & (size != unit)
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
