"""Counts over values per step, segment of channels and position, and over attention products."""

from __future__ import annotations

import numba
import numpy as np

MESSAGES, UNROLLED, GRADED = range(3)
"""Columns: non-zero values, the spikes that they stand for, and those above (or below) one
spike."""


@numba.njit(cache=True, parallel=True)
def tally_maps(values, segment_of, unit, out):
    """Count values [M, C, P] by segment and position into int64 [K, M, segments, P].

    K is 1 for spikes (bool, or any value that only counts once) and 3 for integers.
    """
    for m in numba.prange(values.shape[0]):
        for c in range(values.shape[1]):
            row, found = values[m, c], out[0, m, segment_of[c]]
            for p in range(len(row)):
                found[p] += row[p] != 0
        if out.shape[0] > 1:
            for c in range(values.shape[1]):
                for p in range(values.shape[2]):
                    _grade(values[m, c, p], unit, out, m, segment_of[c], p)


@numba.njit(cache=True, parallel=True)
def tally_tokens(values, gate, segment_of, unit, out):
    """Count values [M, N, D] likewise; gate bool [M, N], or [0, N]: all open."""
    for m in numba.prange(values.shape[0]):
        for n in range(values.shape[1]):
            if len(gate) and not gate[m, n]:
                continue
            row = values[m, n]
            if out.shape[2] == 1:
                found = np.int32(0)
                for c in range(len(row)):
                    found += np.int32(row[c] != 0)
                out[0, m, 0, n] += found
            else:
                for c in range(len(row)):
                    out[0, m, segment_of[c], n] += row[c] != 0
            if out.shape[0] > 1:
                for c in range(len(row)):
                    _grade(row[c], unit, out, m, segment_of[c], n)


@numba.njit(cache=True)
def _grade(value, unit, out, m, s, p):
    if value != 0:
        size = abs(np.int64(value))
        out[1, m, s, p] += -(-size // unit)
        out[2, m, s, p] += np.int64(size != unit)


@numba.njit(cache=True, parallel=True)
def tally_tiles(active, row_of, column_of, maps, out):
    """Count non-zero values by tile into int64 [M, rows, columns].

    Args:
        active: [M, C, P] if maps, else [M, N, D].
    """
    for m in numba.prange(active.shape[0]):
        for i in range(active.shape[1]):
            values = active[m, i]
            if maps and out.shape[1] == 1:
                out[m, 0, column_of[i]] += _nonzero(values)
            elif maps:
                for j in range(len(values)):
                    out[m, row_of[j], column_of[i]] += values[j] != 0
            elif out.shape[2] == 1:
                out[m, row_of[i], 0] += _nonzero(values)
            else:
                for j in range(len(values)):
                    out[m, row_of[i], column_of[j]] += values[j] != 0


@numba.njit(cache=True)
def _nonzero(values):
    found = np.int32(0)
    for j in range(len(values)):
        found += np.int32(values[j] != 0)
    return found


@numba.njit(cache=True, parallel=True)
def attend_by_table(q, k, v, gate, width, row_of, column_of, out):
    """Events of `q (k^T v)` by tile.

    Every row of tiles holds a copy of the tables of its columns and writes all tokens into it;
    the writes of tokens of other rows are repeats.

    Args:
        q, k, v: [M, N, D]; gate [M, N], or [0, N].
        width: channels of a head.
        out: int64 [3, M, rows, columns]: coincidences, reads, repeated coincidences.
    """
    steps, tokens, channels = q.shape
    rows, columns = out.shape[2], out.shape[3]
    for m in numba.prange(steps):
        table = np.zeros((width, width), np.int32)
        filled = np.zeros((width, columns), np.int64)
        spikes = np.zeros(columns, np.int64)
        for low in range(0, channels, width):
            table[:] = 0
            for n in range(tokens):
                if len(gate) and not gate[m, n]:
                    continue
                keys = 0
                for i in range(width):
                    if k[m, n, low + i]:
                        keys += 1
                        for j in range(width):
                            table[i, j] += np.int32(v[m, n, low + j] != 0)
                if keys == 0:
                    continue
                spikes[:] = 0
                for j in range(width):
                    if v[m, n, low + j]:
                        spikes[column_of[low + j]] += 1
                for c in range(columns):
                    if spikes[c]:
                        for r in range(rows):
                            kind = 0 if r == row_of[n] else 2
                            out[kind, m, r, c] += keys * spikes[c]
            filled[:] = 0
            for i in range(width):
                for j in range(width):
                    if table[i, j]:
                        filled[i, column_of[low + j]] += 1
            for n in range(tokens):
                if len(gate) and not gate[m, n]:
                    continue
                for i in range(width):
                    if q[m, n, low + i]:
                        for c in range(columns):
                            out[1, m, row_of[n], c] += filled[i, c]


@numba.njit(cache=True, parallel=True)
def attend_by_scores(q, k, v, gate, width, row_of, column_of, out):
    """Events of `(q k^T) v` by tile; arguments as in `attend_by_table`.

    A head that is cut into several columns is scored in each; all but the first repeat.
    """
    steps, tokens, channels = q.shape
    columns = out.shape[3]
    for m in numba.prange(steps):
        spikes = np.zeros((tokens, columns), np.int64)
        for low in range(0, channels, width):
            first, last = column_of[low], column_of[low + width - 1]
            spikes[:] = 0
            for n in range(tokens):
                for j in range(width):
                    if v[m, n, low + j]:
                        spikes[n, column_of[low + j]] += 1
            for n in range(tokens):
                if len(gate) and not gate[m, n]:
                    continue
                for o in range(tokens):
                    if len(gate) and not gate[m, o]:
                        continue
                    score = 0
                    for i in range(width):
                        if q[m, n, low + i] and k[m, o, low + i]:
                            score += 1
                    if score == 0:
                        continue
                    for c in range(first, last + 1):
                        out[0 if c == first else 2, m, row_of[n], c] += score
                        out[1, m, row_of[n], c] += spikes[o, c]
