"""LIF neurons over all time steps of a layer, fused with the gate and the counts of updates.

The state of one row (a token or a pixel) stays in the cache while time passes.
"""

from __future__ import annotations

import numba
import numpy as np

from atsnn.fixed_point import ACTIVATION_SHIFT, DECAY_UNITY, STATE_LIMIT
from hardware.engine.neuron_tiles import IDLE_SHIFT, SATURATED_SHIFT, fire

SATURATED, IDLE, GATED, WRAPPED = range(4)
"""Columns of the counts that `fire_short` and `fire_full` fill."""


@numba.njit(parallel=True, cache=True)
def fire_short(activation, gate, bias, voltage, halving, threshold, count_idle, spikes, counts):
    """Neurons without current memory whose voltage halves or stays.

    Args:
        activation: int16 or int32 [S, B, R, E], S = 1 if it stands still.
        gate: bool [G, B, R], or of length 0: no gate.
        bias: int32 [E].
        voltage: int32 [B, R, E], changed in place.
        halving: 1 if the voltage halves at each step, else 0.
        threshold: of the voltage, shifted.
        count_idle: whether to count neurons without input, state or bias.
        spikes: bool [T, B, R, E], filled.
        counts: int64 [B, R, 4], added to.
    """
    steps, images, rows, width = spikes.shape
    for unit in numba.prange(images * rows):
        b, r = unit // rows, unit % rows
        v = voltage[b, r]
        for t in range(steps):
            fired = spikes[t, b, r]
            if len(gate) and not gate[t % len(gate), b, r]:
                fired[:] = False
                counts[b, r, GATED] += width
                continue
            a = activation[t % len(activation), b, r]
            if count_idle:
                counts[b, r, IDLE] += _idle(a, v, bias)
            counts[b, r, SATURATED] += _step_short(a, v, bias, halving, threshold, fired)


@numba.njit(parallel=True, cache=True)
def fire_tiles(activation, gate, bias, voltage, halving, threshold, spikes, counts):
    """As `fire_short`, idle neurons counted, for rows whose width is a multiple of 16."""
    steps, images, rows, width = spikes.shape
    size = activation.itemsize
    bias_at = np.int64(bias.ctypes.data)
    for unit in numba.prange(images * rows):
        b, r = unit // rows, unit % rows
        voltage_at = np.int64(voltage[b, r].ctypes.data)
        for t in range(steps):
            if len(gate) and not gate[t % len(gate), b, r]:
                spikes[t, b, r] = False
                counts[b, r, GATED] += width
                continue
            arriving = np.int64(activation[t % len(activation), b, r].ctypes.data)
            fired_at = np.int64(spikes[t, b, r].ctypes.data)
            first = 0
            while first < width:
                tile = 64 if first + 64 <= width else 16
                found = fire(
                    size, tile, arriving + size * first, ACTIVATION_SHIFT, halving, threshold,
                    bias_at + 4 * first, voltage_at + 4 * first, fired_at + first,
                )  # fmt: skip
                counts[b, r, IDLE] += (found >> IDLE_SHIFT) & 0xFF
                counts[b, r, SATURATED] += found >> SATURATED_SHIFT
                first += tile


@numba.njit(cache=True)
def _idle(activation, state, bias):
    found = np.int32(0)
    for e in range(len(state)):
        found += np.int32((activation[e] | state[e] | bias[e]) == 0)
    return found


@numba.njit(cache=True)
def _step_short(activation, voltage, bias, halving, threshold, fired):
    """All in 32 bits, so that the loop becomes vector instructions."""
    saturated = zero = np.int32(0)
    high, low = np.int32(STATE_LIMIT), np.int32(-STATE_LIMIT)
    for e in range(len(voltage)):
        v = voltage[e]
        v = np.int32(v + (np.int32(v < zero) & halving)) >> halving  # halves toward zero
        v = np.int32(np.int32(v) + np.int32(np.int32(activation[e]) << ACTIVATION_SHIFT) + bias[e])
        clipped = v if v < high else high
        clipped = clipped if clipped > low else low
        saturated += np.int32(clipped != v)
        spike = clipped > threshold
        fired[e] = spike
        voltage[e] = zero if spike else clipped
    return saturated


@numba.njit(parallel=True, cache=True)
def fire_full(
    activation, gate, bias, current, voltage, du, dv, threshold, count_idle, spikes, counts
):
    """Any neuron, as `fixed_point.lif_step`; arguments as in `fire_short`, and the current."""
    steps, images, rows, width = spikes.shape
    for unit in numba.prange(images * rows):
        b, r = unit // rows, unit % rows
        for t in range(steps):
            if len(gate) and not gate[t % len(gate), b, r]:
                spikes[t, b, r, :] = False
                counts[b, r, GATED] += width
                continue
            a = activation[t % len(activation), b, r]
            i, v, fired, count = current[b, r], voltage[b, r], spikes[t, b, r], counts[b, r]
            if count_idle:
                count[IDLE] += _idle(a, v | i, bias)
            _step_full(a, i, v, bias, du, dv, threshold, fired, count)


@numba.njit(cache=True)
def _step_full(activation, current, voltage, bias, du, dv, threshold, fired, count):
    for e in range(len(voltage)):
        raw = _decayed(current[e], du + 1) + (np.int64(activation[e]) << ACTIVATION_SHIFT)
        wrapped = ((raw + STATE_LIMIT) & (2**24 - 1)) - STATE_LIMIT
        count[WRAPPED] += wrapped != raw
        current[e] = wrapped
        v = _decayed(voltage[e], dv) + wrapped + bias[e]
        clipped = min(max(v, -STATE_LIMIT), STATE_LIMIT)
        count[SATURATED] += clipped != v
        fired[e] = clipped > threshold
        voltage[e] = 0 if fired[e] else clipped


@numba.njit(cache=True)
def _decayed(state, constant):
    magnitude = (abs(np.int64(state)) * (DECAY_UNITY - constant)) >> 12
    return magnitude if state >= 0 else -magnitude
