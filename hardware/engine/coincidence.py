"""Spiking attention, event-driven: `out[n] = sum_m (q_n . k_m) v[m]` per head, and its events.

A head is a table [d, d]. Each pair of a k and a v spike of one token adds one to it, each q spike
reads a row. Tokens whose gate is closed are neither read nor written. The spikes of a token are
kept as bits, so that the coincidences of the other order are counted a word at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from hardware.engine import buffers, vectors
from hardware.engine.addition import integers_for
from hardware.engine.plan import Interval
from hardware.engine.rows import Array
from hardware.errors import EngineError

MESSAGES, SCORES, SCORE_READS, TABLE, TABLE_READS = range(5)
"""Columns of the counts: spikes read; coincidences and reads of (q k^T) v and of q (k^T v)."""

MOST_TOKENS = 2**15 - 1
"""What an entry of a table, 16 bits, can count."""
_WORD = 32


class Attended(NamedTuple):
    """What attention gave.

    Attributes:
        out: int16 or int32 [S, B, N, D].
        events: int64 [B, 5], zeros if they were not wanted.
        messages: int32 [S, B, N], how many values of a token are not 0, or zeros.
    """

    out: Array
    events: Array
    messages: Array


def attend(q: Array, k: Array, v: Array, gate: Array | None, heads: int, count: bool) -> Attended:
    """Attention of bool [S, B, N, D], and its events per image.

    Args:
        q, k, v: spikes.
        gate: bool [S, B, N], or None: all open.
        heads: contiguous groups of the last axis.
        count: whether the events are wanted.

    Raises:
        EngineError: more tokens than an entry of a table can count.
    """
    steps, images, tokens, channels = q.shape
    if tokens > MOST_TOKENS:
        raise EngineError(
            f"attention over {tokens} tokens, at most {MOST_TOKENS}: use larger patches"
        )
    gates = np.ones((1, 1, tokens), np.bool_) if gate is None else gate
    gates = np.ascontiguousarray(np.broadcast_to(gates, (steps, images, tokens)))
    width = channels // heads
    room = -(-width // vectors.ADDED_LANES) * vectors.ADDED_LANES
    dtype = integers_for(Interval(0, tokens * width))
    out = buffers.empty((steps, images, tokens, heads, room), dtype)
    counts = np.zeros((steps, images, 5), np.int64)
    filled = np.zeros((steps, images, tokens), np.int32)
    _attend(
        _by_heads(q, heads, room), _by_heads(k, heads, room), _by_heads(v, heads, room), gates,
        count, out.reshape(steps, images, tokens, -1), counts, filled,
    )  # fmt: skip
    return Attended(out[..., :width].reshape(q.shape), counts.sum(axis=0), filled)


def _by_heads(spikes: Array, heads: int, room: int) -> Array:
    """Bytes [S, B, N, heads, room]; a copy only where a head does not fill its room."""
    split = spikes.view(np.uint8).reshape(*spikes.shape[:3], heads, -1)
    if split.shape[-1] < room:
        split = np.pad(split, [(0, 0)] * 4 + [(0, room - split.shape[-1])])
    return np.ascontiguousarray(split)


@numba.njit(parallel=True, cache=True)
def _attend(q, k, v, gate, count, out, counts, filled):
    steps, images, tokens, heads, room = q.shape
    words = (room + _WORD - 1) // _WORD
    q_at, k_at, v_at = np.int64(q.ctypes.data), np.int64(k.ctypes.data), np.int64(v.ctypes.data)
    out_at, size = np.int64(out.ctypes.data), out.itemsize
    for unit in numba.prange(steps * images):
        t, b = unit // images, unit % images
        table = np.zeros((room, room), np.int16)
        asking, offered = np.zeros((2, room), np.int64)
        values, reads = np.zeros((2, tokens), np.int32)
        offers, asks = np.zeros((2, words, tokens), np.uint32)
        table_at = np.int64(table.ctypes.data)
        result, made = counts[t, b], out[t, b]
        made[:] = 0
        for h in range(heads):
            table[:] = 0
            asking[:] = 0
            offered[:] = 0
            offering = 0  # tokens with spikes of both k and v
            for n in range(tokens):
                if not gate[t, b, n]:
                    continue
                row = ((unit * tokens + n) * heads + h) * room
                given_at = v_at + row
                spikes = _spikes(given_at, room)
                found = 0
                for w in range(words):
                    word = _bits(k_at + row, room, w)
                    offers[w, offering] = word
                    found += vectors.ones(word)
                    while word:
                        i = w * _WORD + vectors.lowest(word)
                        if spikes:
                            vectors.add_bytes_to_shorts(table_at + 2 * i * room, given_at, room)
                        offered[i] += 1
                        word &= word - np.uint64(1)
                values[offering] = spikes
                offering += found > 0 and spikes > 0
                result[TABLE] += found * spikes
                result[MESSAGES] += found + spikes
            queriers = 0
            for n in range(tokens):
                if not gate[t, b, n]:
                    continue
                row = ((unit * tokens + n) * heads + h) * room
                for w in range(words):
                    word = _bits(q_at + row, room, w)
                    asks[w, queriers] = word
                    result[MESSAGES] += vectors.ones(word)
                    while word:
                        i = w * _WORD + vectors.lowest(word)
                        entry_at = table_at + 2 * i * room
                        if size == 2:
                            vectors.add_shorts(out_at + size * row, entry_at, room)
                        else:
                            vectors.add_shorts_to_ints(out_at + size * row, entry_at, room)
                        asking[i] += 1
                        word &= word - np.uint64(1)
                queriers += 1
            if count:
                result[SCORE_READS] += _reads(
                    asks[:, :queriers], offers[:, :offering], values[:offering], reads[:queriers]
                )
                for i in range(room):
                    if asking[i]:
                        result[SCORES] += asking[i] * offered[i]
                        entries = vectors.filled_shorts(table_at + 2 * i * room, room)
                        result[TABLE_READS] += asking[i] * entries
        if count:
            for n in range(tokens):
                if gate[t, b, n]:
                    row_at = out_at + size * (unit * tokens + n) * heads * room
                    if size == 2:
                        filled[t, b, n] = vectors.filled_shorts(row_at, heads * room)
                    else:
                        filled[t, b, n] = _filled(made[n])


@numba.njit(cache=True)
def _bits(address, length, word):
    """The `word`-th 32 spikes of a row as bits."""
    at, left = address + word * _WORD, length - word * _WORD
    if left >= _WORD:
        return vectors.bits_of_32(at)
    bits = np.uint64(0)
    for c in range(0, left, 8):
        bits |= vectors.bits_of_8(at + c) << np.uint64(c)
    return bits


@numba.njit(cache=True)
def _spikes(address, length):
    found = 0
    for w in range((length + _WORD - 1) // _WORD):
        found += vectors.ones(_bits(address, length, w))
    return found


@numba.njit(cache=True)
def _filled(row):
    found = np.int32(0)
    for j in range(len(row)):
        found += np.int32(row[j] != 0)
    return found


@numba.njit(cache=True)
def _reads(asks, offers, values, reads):
    """How often a v spike is read, by a score that is not 0."""
    reads[:] = 0
    for m in range(len(values)):
        if len(asks) == 1:
            _meet(asks[0], offers[0, m], values[m], reads)
            continue
        for n in range(len(reads)):
            met = np.uint32(0)
            for w in range(len(asks)):
                met |= asks[w, n] & offers[w, m]
            reads[n] += values[m] if met != 0 else np.int32(0)
    total = np.int64(0)
    for n in range(len(reads)):
        total += reads[n]
    return total


@numba.njit(cache=True)
def _meet(asks, offer, value, reads):
    for n in range(len(reads)):
        reads[n] += value if (asks[n] & offer) != 0 else np.int32(0)
