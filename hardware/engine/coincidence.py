"""Spiking attention, event-driven: `out[n] = sum_m (q_n . k_m) v[m]` per head, and its events.

A head is a table [d, d]. Each pair of a k and a v spike of one token adds one to it, each q spike
reads a row. Tokens whose gate is closed are neither read nor written. The spikes of a token are
kept as bits, so that the coincidences of the other order are counted a word at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import ACTIVATION_SHIFT
from atsnn.llvm import SIXTEEN
from hardware.engine import buffers, vectors
from hardware.engine.addition import integers_for
from hardware.engine.neuron_tiles import IDLE_SHIFT, SATURATED_SHIFT, fire
from hardware.engine.plan import Interval
from hardware.engine.rows import Array
from hardware.errors import EngineError

MESSAGES, SCORES, SCORE_READS, TABLE, TABLE_READS = range(5)
"""Columns of the counts: spikes read; coincidences and reads of (q k^T) v and of q (k^T v)."""

MOST_TOKENS = 2**15 - 1
"""What an entry of a table, 16 bits, can count."""
_WORD, _GROUP = 32, 64


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
    width = channels // heads
    room = _room(width)
    dtype = integers_for(Interval(0, tokens * width))
    out = buffers.empty((steps, images, tokens, heads, room), dtype)
    counts = np.zeros((steps, images, 5), np.int64)
    filled = np.zeros((steps, images, tokens), np.int32)
    _attend(
        _by_heads(q, heads, room), _by_heads(k, heads, room), _by_heads(v, heads, room),
        _every_step(gate, q), count, out.reshape(steps, images, tokens, -1), counts, filled,
    )  # fmt: skip
    return Attended(out[..., :width].reshape(q.shape), counts.sum(axis=0), filled)


class FiringAttention(NamedTuple):
    """What attention and the neurons behind it did.

    Attributes:
        spikes: bool [T, B, N, D].
        found: spikes of each token, int32 [T, B, N].
        events, messages: as in `Attended`.
        idle: neuron updates without input, state or bias, int64 [B].
        saturations: voltages that were clipped.
    """

    spikes: Array
    found: Array
    events: Array
    messages: Array
    idle: Array
    saturations: int


def can_fire(tokens: int, channels: int, heads: int) -> bool:
    """Whether `attend_and_fire` takes attention of this shape."""
    width = channels // heads
    fills_lanes = _room(width) == width and channels % SIXTEEN == 0
    return fills_lanes and integers_for(Interval(0, tokens * width)) is np.int16


def attend_and_fire(
    q: Array, k: Array, v: Array, gate: Array | None, heads: int, count: bool,
    bias: npt.NDArray[np.int32], halving: int, threshold: int,
) -> FiringAttention:  # fmt: skip
    """`attend`, and all steps of neurons without current memory behind it, from zero.

    Args:
        bias: int32 [D]. halving: 1, or 0 if the voltage stays. threshold: shifted.
    """
    steps, images, tokens, channels = q.shape
    width = channels // heads
    spikes = buffers.empty(q.shape, np.bool_)
    counts = np.zeros((steps, images, 5), np.int64)
    filled, found = np.zeros((2, steps, images, tokens), np.int32)
    idle, saturated = np.zeros((2, images), np.int64)
    _attend_and_fire(
        _by_heads(q, heads, width), _by_heads(k, heads, width), _by_heads(v, heads, width),
        _every_step(gate, q), count, bias, halving, threshold, spikes.view(np.uint8), counts,
        filled, found, idle, saturated,
    )  # fmt: skip
    return FiringAttention(spikes, found, counts.sum(axis=0), filled, idle, int(saturated.sum()))


def _room(width: int) -> int:
    """Channels of a head, filled up."""
    return -(-width // vectors.ADDED_LANES) * vectors.ADDED_LANES


def _every_step(gate: Array | None, spikes: Array) -> Array:
    """The gate as bool [S, B, N]."""
    gates = np.ones((1, 1, 1), np.bool_) if gate is None else gate
    return np.ascontiguousarray(np.broadcast_to(gates, spikes.shape[:3]))


def _by_heads(spikes: Array, heads: int, room: int) -> Array:
    """Bytes [S, B, N, heads, room]; a copy only where a head does not fill its room."""
    split = spikes.view(np.uint8).reshape(*spikes.shape[:3], heads, -1)
    if split.shape[-1] < room:
        split = np.pad(split, [(0, 0)] * 4 + [(0, room - split.shape[-1])])
    return np.ascontiguousarray(split)


@numba.njit(parallel=True, cache=True)
def _attend(q, k, v, gate, count, out, counts, filled):
    steps, images, tokens, heads, room = q.shape
    sizes = tokens, heads, room
    q_at, k_at, v_at = np.int64(q.ctypes.data), np.int64(k.ctypes.data), np.int64(v.ctypes.data)
    out_at, size = np.int64(out.ctypes.data), out.itemsize
    for unit in numba.prange(steps * images):
        t, b = unit // images, unit % images
        first = unit * tokens * heads * room
        made = out[t, b]
        made[:] = 0
        _attend_once(
            q_at + first, k_at + first, v_at + first, gate[t, b], sizes, count,
            out_at + size * first, size, _scratch(tokens, room), counts[t, b],
        )  # fmt: skip
        if count:
            for n in range(tokens):
                if gate[t, b, n] and size == 2:
                    row_at = out_at + size * (first + n * heads * room)
                    filled[t, b, n] = vectors.filled_shorts(row_at, heads * room)
                elif gate[t, b, n]:
                    filled[t, b, n] = _filled(made[n])


@numba.njit(parallel=True, cache=True)
def _attend_and_fire(
    q, k, v, gate, count, bias, halving, threshold, spikes, counts, filled, found, idle, saturated
):
    """An image's sums stay in the cache for the neurons behind them."""
    steps, images, tokens, heads, room = q.shape
    sizes, width = (tokens, heads, room), heads * room
    q_at, k_at, v_at = np.int64(q.ctypes.data), np.int64(k.ctypes.data), np.int64(v.ctypes.data)
    spikes_at, bias_at = np.int64(spikes.ctypes.data), np.int64(bias.ctypes.data)
    for b in numba.prange(images):
        scratch = _scratch(tokens, room)
        made, voltage = np.zeros(tokens * width, np.int16), np.zeros(tokens * width, np.int32)
        made_at, voltage_at = np.int64(made.ctypes.data), np.int64(voltage.ctypes.data)
        quiet = clipped = np.int64(0)
        for t in range(steps):
            first = (t * images + b) * tokens * width
            for n in range(tokens):
                if gate[t, b, n]:
                    made[n * width : (n + 1) * width] = 0
            _attend_once(
                q_at + first, k_at + first, v_at + first, gate[t, b], sizes, count, made_at, 2,
                scratch, counts[t, b],
            )  # fmt: skip
            for n in range(tokens):
                if not gate[t, b, n]:
                    fired = spikes[t, b, n]
                    for e in range(width):
                        fired[e] = 0
                    continue
                if count:
                    filled[t, b, n] = vectors.filled_shorts(made_at + 2 * n * width, width)
                done = 0
                while done < width:
                    tile = 64 if done + 64 <= width else 16
                    place = n * width + done
                    news = fire(
                        2, tile, made_at + 2 * place, ACTIVATION_SHIFT, halving, threshold,
                        bias_at + 4 * done, voltage_at + 4 * place, spikes_at + first + place,
                    )  # fmt: skip
                    found[t, b, n] += news & 0xFF
                    quiet += (news >> IDLE_SHIFT) & 0xFF
                    clipped += news >> SATURATED_SHIFT
                    done += tile
        idle[b] = quiet
        saturated[b] = clipped


@numba.njit(cache=True)
def _scratch(tokens, room):
    """Table; how often each entry is offered; v spikes and k spikes of tokens that have both; for
    each entry a bit for each token that asks for it; the tokens that are open."""
    words, groups = (room + _WORD - 1) // _WORD, (tokens + _GROUP - 1) // _GROUP
    return (
        np.zeros((room, room), np.int16),
        np.zeros(room, np.int64),
        np.zeros(tokens, np.int64),
        np.zeros((words, tokens), np.uint64),
        np.zeros((room, groups), np.uint64),
        np.zeros(tokens, np.int64),
    )


@numba.njit(cache=True)
def _attend_once(q_at, k_at, v_at, gate, sizes, count, out_at, size, scratch, result):
    """One step of one image; `out_at` is the address of zeros."""
    tokens, heads, room = sizes
    table, offered, values, offers, askers, who = scratch
    words, there = len(offers), 0
    for n in range(tokens):
        who[there] = n
        there += gate[n]
    table_at = np.int64(table.ctypes.data)
    for h in range(heads):
        table[:] = 0
        offered[:] = 0
        askers[:] = 0
        offering = 0
        for n in who[:there]:
            row = (n * heads + h) * room
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
        for n in who[:there]:
            row = (n * heads + h) * room
            for w in range(words):
                word = _bits(q_at + row, room, w)
                result[MESSAGES] += vectors.ones(word)
                while word:
                    i = w * _WORD + vectors.lowest(word)
                    entry_at = table_at + 2 * i * room
                    if size == 2:
                        vectors.add_shorts(out_at + size * row, entry_at, room)
                    else:
                        vectors.add_shorts_to_ints(out_at + size * row, entry_at, room)
                    askers[i, n // _GROUP] |= np.uint64(1) << np.uint64(n % _GROUP)
                    word &= word - np.uint64(1)
        if count:
            for m in range(offering):
                result[SCORE_READS] += values[m] * _readers(offers, m, askers)
            for i in range(room):
                asking = _tokens(askers, i)
                if asking:
                    result[SCORES] += asking * offered[i]
                    entries = vectors.filled_shorts(table_at + 2 * i * room, room)
                    result[TABLE_READS] += asking * entries


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
def _readers(offers, m, askers):
    """How many tokens ask for anything that the `m`-th one offers."""
    found = np.int64(0)
    for group in range(askers.shape[1]):
        met = np.uint64(0)
        for w in range(len(offers)):
            word = offers[w, m]
            while word:
                met |= askers[w * _WORD + vectors.lowest(word), group]
                word &= word - np.uint64(1)
        found += vectors.ones(met)
    return found


@numba.njit(cache=True)
def _tokens(askers, i):
    found = np.int64(0)
    for group in range(askers.shape[1]):
        found += vectors.ones(askers[i, group])
    return found
