"""Dense layers of bytes: where most inputs are events, or so few that lists do not pay.

The integers are those of `synapses`; which of the two runs a layer is decided by what it costs at
the density that is measured. Needs an instruction that multiplies bytes (VNNI); on a machine
without it, every layer is event-driven.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from hardware.engine import buffers
from hardware.engine.neuron_tiles import IDLE_SHIFT, SATURATED_SHIFT, fire, fire_still
from hardware.engine.plan import Interval
from hardware.engine.products import AT_ONCE, multiply, multiply_and_fire
from hardware.engine.rows import Array
from hardware.engine.synapses import FiringResult, SpikingSynapses, Synapses, clear_closed

LARGEST_BYTE = 255
_SPARE = 64

_WINDOW_ROW, _EVENT, _PRODUCT = 8.0, 0.4, 0.14
_LISTED, _MULTIPLIED = 14.0, 5.0
"""Nanoseconds on one core of an AMD EPYC (Zen 5), per tile of a target pixel and step: for each row
of the window, for each event in it, for 4 x 16 products, and for all the rest in either kernel.
Which kernel runs depends on them, never what it computes."""


def can_be_bytes(values: Interval, shift: int) -> bool:
    """Whether values, divided by 2^shift, are unsigned bytes."""
    return values.low >= 0 and values.high >> shift <= LARGEST_BYTE


def dense_is_faster(synapses: Synapses, density: float) -> bool:
    """Whether the dense kernel is, where this share of the inputs is not 0."""
    window = synapses.window
    inputs = window.kernel_width * window.channels
    events = density * inputs * window.kernel_height
    listed = _LISTED + _WINDOW_ROW * window.kernel_height + _EVENT * events
    fours = window.kernel_height * -(-inputs // 4) * synapses.tile / 16
    return _MULTIPLIED + _PRODUCT * fours < listed


@dataclass(frozen=True)
class Bytes:
    """What arrives at a layer, with zeros round it.

    Attributes:
        values: uint8, flat; longer by a few bytes where the last window reaches beyond its map.
        steps: S.
        line: bytes of one line of the padded map.
        image, step: bytes from one image or step to the next.
    """

    values: npt.NDArray[np.uint8]
    steps: int
    line: int
    image: int
    step: int


def as_bytes(rows: Array, synapses: Synapses, shift: int) -> Bytes:
    """Rows [S, B, R, E] of spikes, or of integers that divided by 2^shift are at most 255."""
    window = synapses.window
    steps, images = rows.shape[:2]
    height = window.height + 2 * window.padding_y
    width = window.width + 2 * window.padding_x
    line = width * window.channels
    size = height * line
    layout = steps, line, size, images * size
    in_place = rows.dtype == np.bool_ and (height, width) == (window.height, window.width)
    if in_place and window.kernel_width * window.channels % 4 == 0:
        return Bytes(rows.view(np.uint8).reshape(-1), *layout)
    values = buffers.empty((steps * images * size + _SPARE,), np.uint8)
    values[-_SPARE:] = 0
    maps = values[:-_SPARE].reshape(steps, images, height, line)
    source = rows.view(np.uint8) if rows.dtype == np.bool_ else rows
    lines = source.reshape(steps, images, window.height, -1)
    _place(lines, shift, window.padding_y, window.padding_x * window.channels, maps)
    return Bytes(values, *layout)


@numba.njit(parallel=True, cache=True)
def _place(lines, shift, top, left, maps):
    """Lines shifted to the right, with zeros round each map."""
    steps, images, height, width = lines.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        target = maps[t, b]
        target[:top] = 0
        target[top + height :] = 0
        for y in range(height):
            source, line = lines[t, b, y], target[top + y]
            line[:left] = 0
            line[left + width :] = 0
            inner = line[left : left + width]
            for x in range(width):
                inner[x] = source[x] >> shift


class DenseSynapses:
    """The weights of a layer for dense products, with the neurons behind them.

    Attributes:
        packed: int8 [tiles, kernel height, fours, tile, 4].
    """

    def __init__(self, spiking: SpikingSynapses) -> None:
        self.spiking = spiking
        rows = spiking.synapses.pack()
        tiles, height, taps, tile = rows.shape
        fours = -(-taps // 4)
        padded = np.zeros((tiles, height, 4 * fours, tile), np.int8)
        padded[:, :, :taps] = rows
        split = padded.reshape(tiles, height, fours, 4, tile)
        self.packed = np.ascontiguousarray(split.transpose(0, 1, 2, 4, 3))

    def fire(
        self, arriving: Bytes, images: int, gate: npt.NDArray[np.bool_] | None, steps: int
    ) -> FiringResult:
        """As `SpikingSynapses.fire`."""
        spiking, synapses = self.spiking, self.spiking.synapses
        result = spiking.room(images, steps, gate)
        kernel = _fire_still if arriving.steps < steps else _fire_moving
        kernel(
            arriving.values, (arriving.line, arriving.image, arriving.step), result.gate,
            self.packed, synapses.window, result.blocks, spiking.bias, spiking.shift,
            spiking.halving, spiking.threshold, result.spikes.view(np.uint8), result.found,
            result.idle, result.saturated,
        )  # fmt: skip
        return result.done()


@numba.njit(cache=True)
def _open(gate, t, b, place):
    """Whether neurons take part in a step; without gates, all do."""
    return len(gate) == 0 or gate[t % len(gate), b, place]


@numba.njit(cache=True)
def _all_open(gate, b, place):
    found = True
    for t in range(len(gate)):
        found &= gate[t, b, place]
    return found


@numba.njit(cache=True)
def _open_steps(gate, first, last, b, place):
    """The steps from `first` on that neurons take part in, a bit for each."""
    bits = 0
    for t in range(first, last):
        bits |= np.int64(_open(gate, t, b, place)) << (t - first)
    return bits


@numba.njit(cache=True)
def _copy(fired, count, spikes, first):
    for o in range(count):
        spikes[first + o] = fired[o]


@numba.njit(parallel=True, cache=True)
def _fire_moving(
    values, layout, gate, packed, window, blocks,
    bias, shift, halving, threshold, spikes, found, idle, saturated,
):  # fmt: skip
    """Each step has values of its own."""
    steps, images, places, outputs = spikes.shape
    line, image, step = layout
    tiles, height, fours, tile, _ = packed.shape
    lines = (window.out_height + blocks - 1) // blocks
    values_at, packed_at = np.int64(values.ctypes.data), np.int64(packed.ctypes.data)
    bias_at, spikes_at = np.int64(bias.ctypes.data), np.int64(spikes.ctypes.data)
    found_at = np.int64(found.ctypes.data)
    spikes_step, found_step = images * places * outputs, images * places * 4
    for unit in numba.prange(images * blocks):
        b, top = unit // blocks, (unit % blocks) * lines
        sums, voltage = np.zeros(tile, np.int32), np.zeros(tile, np.int32)
        fired = np.zeros(tile, np.uint8)
        sums_at, voltage_at = np.int64(sums.ctypes.data), np.int64(voltage.ctypes.data)
        fired_at = np.int64(fired.ctypes.data)
        quiet = clipped = np.int64(0)
        bottom = min(top + lines, window.out_height)
        clear_closed(gate, b, top * window.out_width, bottom * window.out_width, spikes)
        for part in range(tiles):
            first = part * tile
            count = min(tile, outputs - first)
            drive = bias_at + 4 * first
            weights = packed_at + part * height * fours * tile * 4
            for y in range(top, bottom):
                for x in range(window.out_width):
                    place = y * window.out_width + x
                    corner = (
                        values_at + b * image + y * window.stride_y * line
                        + x * window.stride_x * window.channels
                    )  # fmt: skip
                    voltage[:] = 0
                    for t in range(0, steps, AT_ONCE):
                        last = min(t + AT_ONCE, steps)
                        taking_part = _open_steps(gate, t, last, b, place)
                        if taking_part == 0:
                            continue
                        if last == t + AT_ONCE:
                            row = (t * images + b) * places + place
                            counts = multiply_and_fire(
                                taking_part, tile, count, corner + t * step, step, height, line,
                                fours, weights, shift, halving, threshold, voltage_at, drive,
                                spikes_at + row * outputs + first, spikes_step,
                                found_at + 4 * row, found_step,
                            )  # fmt: skip
                            quiet += counts & 0xFFFFFFFF
                            clipped += counts >> SATURATED_SHIFT
                        else:
                            for s in range(t, last):
                                if taking_part >> (s - t) & 1:
                                    multiply(
                                        1, tile, corner + s * step, step, height, line, fours,
                                        weights, sums_at,
                                    )  # fmt: skip
                                    counts = fire(
                                        4, tile, sums_at, shift, halving, threshold, drive,
                                        voltage_at, fired_at,
                                    )  # fmt: skip
                                    found[s, b, place] += counts & 0xFF
                                    quiet += (counts >> IDLE_SHIFT) & 0xFF
                                    clipped += counts >> SATURATED_SHIFT
                                    _copy(fired, count, spikes[s, b, place], first)
        idle[b, unit % blocks] = quiet
        saturated[b, unit % blocks] = clipped


@numba.njit(parallel=True, cache=True)
def _fire_still(
    values, layout, gate, packed, window, blocks,
    bias, shift, halving, threshold, spikes, found, idle, saturated,
):  # fmt: skip
    """The values stand still, so there is one product for all steps."""
    steps, images, places, outputs = spikes.shape
    line, image, _ = layout
    tiles, height, fours, tile, _ = packed.shape
    lines = (window.out_height + blocks - 1) // blocks
    values_at, packed_at = np.int64(values.ctypes.data), np.int64(packed.ctypes.data)
    bias_at, spikes_at = np.int64(bias.ctypes.data), np.int64(spikes.ctypes.data)
    found_at = np.int64(found.ctypes.data)
    spikes_step, found_step = images * places * outputs, images * places * 4
    stride = window.stride_x * window.channels
    for unit in numba.prange(images * blocks):
        b, top = unit // blocks, (unit % blocks) * lines
        sums, voltage = np.zeros(AT_ONCE * tile, np.int32), np.zeros(tile, np.int32)
        fired = np.zeros(tile, np.uint8)
        sums_at, voltage_at = np.int64(sums.ctypes.data), np.int64(voltage.ctypes.data)
        fired_at = np.int64(fired.ctypes.data)
        quiet = clipped = np.int64(0)
        bottom = min(top + lines, window.out_height)
        clear_closed(gate, b, top * window.out_width, bottom * window.out_width, spikes)
        for part in range(tiles):
            first = part * tile
            count = min(tile, outputs - first)
            drive = bias_at + 4 * first
            weights = packed_at + part * height * fours * tile * 4
            for y in range(top, bottom):
                corner = values_at + b * image + y * window.stride_y * line
                for x in range(window.out_width):
                    place = y * window.out_width + x
                    turn = x % AT_ONCE
                    together = x - turn + AT_ONCE <= window.out_width
                    if not together:
                        turn = 0
                    if turn == 0:
                        multiply(
                            AT_ONCE if together else 1, tile, corner + x * stride, stride, height,
                            line, fours, weights, sums_at,
                        )  # fmt: skip
                    arrived = sums_at + 4 * turn * tile
                    if _all_open(gate, b, place):
                        row = b * places + place
                        counts = fire_still(
                            tile, count, steps, arrived, shift, halving, threshold, drive,
                            spikes_at + row * outputs + first, spikes_step,
                            found_at + 4 * row, found_step,
                        )  # fmt: skip
                        quiet += counts & 0xFFFFFFFF
                        clipped += counts >> SATURATED_SHIFT
                        continue
                    voltage[:] = 0
                    for t in range(steps):
                        if _open(gate, t, b, place):
                            counts = fire(
                                4, tile, arrived, shift, halving, threshold, drive, voltage_at,
                                fired_at,
                            )  # fmt: skip
                            found[t, b, place] += counts & 0xFF
                            quiet += (counts >> IDLE_SHIFT) & 0xFF
                            clipped += counts >> SATURATED_SHIFT
                            _copy(fired, count, spikes[t, b, place], first)
        idle[b, unit % blocks] = quiet
        saturated[b, unit % blocks] = clipped
