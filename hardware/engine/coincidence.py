"""Spiking attention, event-driven: `out[n] = sum_m (q_n . k_m) v[m]` per head, and its events.

A head is a table [d, d]. Each pair of a k and a v spike of one token adds one to it, each q spike
reads a row. Tokens whose gate is closed are neither read nor written.
"""

from __future__ import annotations

import numba
import numpy as np

from hardware.engine.rows import Array

MESSAGES, SCORES, SCORE_READS, TABLE, TABLE_READS = range(5)
"""Columns of the counts: spikes read; coincidences and reads of (q k^T) v and of q (k^T v)."""


def attend(
    q: Array, k: Array, v: Array, gate: Array | None, heads: int, count: bool
) -> tuple[Array, Array]:
    """Attention of bool [S, B, N, D], and its events per image.

    Args:
        q, k, v: spikes.
        gate: bool [S, B, N], or None: all open.
        heads: contiguous groups of the last axis.
        count: whether the events are wanted.

    Returns:
        int32 [S, B, N, D]; int64 [B, 5], zeros if not wanted.
    """
    steps, images, tokens, _ = q.shape
    gates = np.ones((1, 1, tokens), np.bool_) if gate is None else gate
    gates = np.ascontiguousarray(np.broadcast_to(gates, (steps, images, tokens)))
    out = np.zeros(q.shape, np.int32)
    counts = np.zeros((steps, images, 5), np.int64)
    q, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
    _attend(q, k, v, gates, heads, count, out, counts)
    return out, counts.sum(axis=0)


@numba.njit(parallel=True, cache=True)
def _attend(q, k, v, gate, heads, count, out, counts):
    steps, images, tokens, channels = q.shape
    width = channels // heads
    for unit in numba.prange(steps * images):
        t, b = unit // images, unit % images
        table = np.zeros((width, width), np.int32)
        asking, offered = np.zeros((2, width), np.int64)
        values = np.zeros(tokens, np.int32)
        meets = np.zeros((width, tokens), np.uint8)
        met = np.zeros(tokens, np.uint8)
        index = np.empty(width + 1, np.int64)
        result = counts[t, b]
        for h in range(heads):
            low, high = h * width, (h + 1) * width
            table[:] = 0
            offered[:] = 0
            asking[:] = 0
            values[:] = 0
            meets[:] = 0
            for n in range(tokens):
                if gate[t, b, n]:
                    found = active(k[t, b, n, low:high], index)
                    _write(table, index[:found], v[t, b, n, low:high])
                    if count:
                        values[n] = _spikes(v[t, b, n, low:high])
                        result[TABLE] += found * values[n]
                        result[MESSAGES] += found + values[n]
                        for i in index[:found]:
                            offered[i] += 1
                            meets[i, n] = 1
            for n in range(tokens):
                if gate[t, b, n]:
                    found = active(q[t, b, n, low:high], index)
                    _read(table, index[:found], out[t, b, n, low:high])
                    if count:
                        result[MESSAGES] += found
                        result[SCORE_READS] += _readers(meets, index[:found], values, met)
                        for i in index[:found]:
                            asking[i] += 1
            if count:
                for i in range(width):
                    result[SCORES] += asking[i] * offered[i]
                    if asking[i]:
                        result[TABLE_READS] += asking[i] * np.count_nonzero(table[i])


@numba.njit(cache=True)
def _write(table, index, spikes):
    for i in index:
        row = table[i]
        for j in range(len(spikes)):
            row[j] += np.int32(spikes[j])


@numba.njit(cache=True)
def _read(table, index, out):
    for i in index:
        row = table[i]
        for j in range(len(out)):
            out[j] += row[j]


@numba.njit(cache=True)
def _spikes(row):
    found = np.int32(0)
    for j in range(len(row)):
        found += np.int32(row[j])
    return found


@numba.njit(cache=True)
def _readers(meets, index, values, met):
    """How many v spikes read a score that is not 0."""
    if len(index) == 0:
        return np.int32(0)
    met[:] = 0
    for i in index:
        row = meets[i]
        for m in range(len(met)):
            met[m] |= row[m]
    found = np.int32(0)
    for m in range(len(met)):
        found += met[m] * values[m]
    return found


@numba.njit(cache=True)
def active(row, index):
    """Write the places of the non-zero entries to `index` (one longer than the row); how many."""
    found = 0
    for i in range(len(row)):
        index[found] = i
        found += row[i] != 0
    return found
