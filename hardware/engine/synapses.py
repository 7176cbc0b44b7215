"""Event-driven synapses: each event adds its row of 8-bit weights to the sums of its targets.

One kernel serves convolutions and linear layers (a linear layer is a 1 x 1 convolution over a
column of tokens). For each target pixel it walks through the lists of events under the window, with
the sums of up to 64 output channels in vector registers, and lets the neurons behind them fire
before it goes on: the sums are never written to memory.

Weights of a mixed-sign synapse are even, so half of each fits 8 bits. Sums are kept modulo 2^16
where the layer's bound proves that the last one fits; else they move to 32 bits every 255 events,
which no sums of 8-bit weights can overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import ACTIVATION_LIMIT, ACTIVATION_SHIFT, NeuronConstants
from hardware.engine import buffers
from hardware.engine.gathering import NARROW, PRODUCTS, WIDE, gather, gather_and_fire
from hardware.engine.lists import EventLists
from hardware.engine.neuron_tiles import IDLE_SHIFT, SATURATED_SHIFT, TILES, fire
from hardware.engine.neurons import HALVING, NO_CURRENT_MEMORY
from hardware.engine.plan import Interval

Array = npt.NDArray[Any]

_UNITS_PER_THREAD = 4


class Window(NamedTuple):
    """Where a layer looks: a map of `height` x `width` pixels of `channels`, and what it yields."""

    channels: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int
    out_height: int
    out_width: int

    @property
    def places(self) -> int:
        """Number of target pixels."""
        return self.out_height * self.out_width


def map_window(
    shape: tuple[int, ...], kernel: Array, stride: tuple[int, int], padding: tuple[int, int]
) -> Window:
    """Window of a convolution without dilation or groups over maps `shape` = (C, H, W)."""
    channels, height, width = shape
    kh, kw = kernel.shape[2:]
    out_height = (height + 2 * padding[0] - kh) // stride[0] + 1
    out_width = (width + 2 * padding[1] - kw) // stride[1] + 1
    return Window(channels, height, width, kh, kw, *stride, *padding, out_height, out_width)


def token_window(tokens: int, channels: int) -> Window:
    """Window of a linear layer over tokens: each alone."""
    return Window(channels, tokens, 1, 1, 1, 1, 1, 0, 0, tokens, 1)


def fits_eight_bits(weights: Array) -> bool:
    """True if the weights, or all their halves, are 8-bit integers."""
    if not weights.size:
        return False
    half = 1 if (weights & 1).any() else 2
    return int(weights.min()) >= -128 * half and int(weights.max()) <= 127 * half


class Synapses:
    """Packed weights of one layer.

    Attributes:
        outputs: number of output channels.
        window: where each of them looks.
        tile: output channels that are summed up at once.
        factor_shift: sums are to be shifted by this; 1 if the packed weights are halves.
        narrow: whether all final sums fit 16 bits.
    """

    def __init__(
        self, weight: Array, window: Window, largest_sum: int, listed_shift: int = 0
    ) -> None:
        """Pack the weights of a layer.

        Args:
            weight: [O, C, kh, kw], or [O, C] of a linear layer.
            window: of the layer.
            largest_sum: bound of its sums.
            listed_shift: events are listed divided by two to this power.
        """
        self.outputs, self.window = len(weight), window
        self._weight, self._halved = weight, 0 if (weight & 1).any() else 1
        self.factor_shift = self._halved + listed_shift
        self.narrow = largest_sum >> self.factor_shift < 2**15
        self.tile = next((tile for tile in TILES if tile >= self.outputs), TILES[-1])

    @property
    def tiles(self) -> int:
        return -(-self.outputs // self.tile)

    def pack(self) -> npt.NDArray[np.int8]:
        """Weights as the kernel reads them, [tiles, kernel height, kernel width * C, tile]."""
        rows = self.window.kernel_height
        whole = self._weight.reshape(self.outputs, self.window.channels, rows, -1)
        halves = np.zeros((self.tiles * self.tile, *whole.shape[1:]), np.int8)
        halves[: self.outputs] = whole >> self._halved
        by_row = halves.transpose(2, 3, 1, 0).reshape(rows, -1, self.tiles, self.tile)
        return np.ascontiguousarray(by_row.transpose(2, 0, 1, 3))

    @cached_property
    def packed(self) -> npt.NDArray[np.int8]:
        """`pack()`, kept from its first use to `drop_packed`."""
        return self.pack()

    def drop_packed(self) -> None:
        """Forget the packed weights; they are packed again when they are needed."""
        self.__dict__.pop("packed", None)

    def mode(self, events: EventLists) -> int:
        """How the sums of such events are kept."""
        if events.graded:
            return PRODUCTS
        return NARROW if self.narrow else WIDE

    def sums(self, events: EventLists, gate: npt.NDArray[np.bool_] | None) -> Array:
        """Sums, int32 [S, B, places, O]; those of closed rows are 0."""
        steps, images = events.starts.shape[:2]
        steps = steps if gate is None else max(steps, len(gate))
        room = buffers.empty if gate is None else buffers.zeros  # closed places are passed over
        out = room((steps, images, self.window.places, self.outputs), np.int32)
        _sum(
            events.index, events.value, events.starts, _closed(gate, images), self.packed,
            self.window, self.factor_shift, self.mode(events), _blocks(self.window, images), out,
        )  # fmt: skip
        return out


@dataclass(frozen=True)
class FiringResult:
    """What a layer of neurons did.

    Attributes:
        spikes: bool [T, B, places, O].
        found: int32 [T, B, places], spikes of each row.
        idle: int64 [B], updates without input, state or bias.
        saturations: how many voltages were clipped.
    """

    spikes: npt.NDArray[np.bool_]
    found: npt.NDArray[np.int32]
    idle: npt.NDArray[np.int64]
    saturations: int


@dataclass(frozen=True)
class FiringRoom:
    """A `FiringResult` in the making; counts [B, blocks] are of parts of an image."""

    gate: npt.NDArray[np.bool_]
    spikes: npt.NDArray[np.bool_]
    found: npt.NDArray[np.int32]
    idle: npt.NDArray[np.int64]
    saturated: npt.NDArray[np.int64]

    @property
    def blocks(self) -> int:
        return self.idle.shape[1]

    def done(self) -> FiringResult:
        """When a kernel has filled it."""
        saturations = int(self.saturated.sum())
        return FiringResult(self.spikes, self.found, self.idle.sum(axis=1), saturations)


class SpikingSynapses:
    """Synapses and neurons, of the kind that `can_fuse` allows, in one pass over all time steps."""

    def __init__(self, synapses: Synapses, constants: NeuronConstants) -> None:
        self.synapses = synapses
        self.halving = int(constants.dv == HALVING)
        self.threshold = constants.threshold << ACTIVATION_SHIFT
        self.bias = np.ones(synapses.tiles * synapses.tile, np.int32)
        self.bias[: synapses.outputs] = constants.bias
        self.shift = ACTIVATION_SHIFT + synapses.factor_shift

    def fire(
        self,
        events: EventLists,
        gate: npt.NDArray[np.bool_] | None,
        steps: int,
    ) -> FiringResult:
        """Let all time steps pass, from zero state.

        Args:
            events: what arrives, of `steps` steps, or of one if it stands still.
            gate: bool [steps, B, places]: closed neurons do nothing, or None.
            steps: T.
        """
        synapses = self.synapses
        result = self.room(events.starts.shape[1], steps, gate)
        _fire(
            events.index, events.value, events.starts, result.gate, synapses.packed,
            synapses.window, synapses.mode(events), result.blocks, self.bias, self.shift,
            self.halving, self.threshold, result.spikes.view(np.uint8), result.found, result.idle,
            result.saturated,
        )  # fmt: skip
        return result.done()

    def room(self, images: int, steps: int, gate: npt.NDArray[np.bool_] | None) -> FiringRoom:
        """Where a kernel writes what the neurons do."""
        window = self.synapses.window
        places, blocks = window.places, _blocks(window, images)
        return FiringRoom(
            gate=_closed(gate, images),
            spikes=buffers.empty((steps, images, places, self.synapses.outputs), np.bool_),
            found=buffers.zeros((steps, images, places), np.int32),
            idle=np.zeros((images, blocks), np.int64),
            saturated=np.zeros((images, blocks), np.int64),
        )


def can_fuse(constants: NeuronConstants, activation: Interval) -> bool:
    """Whether the kernel has such neurons: no current memory, no current that can wrap."""
    memoryless = constants.du == NO_CURRENT_MEMORY and constants.dv in (0, HALVING)
    return memoryless and activation.magnitude <= ACTIVATION_LIMIT


def _closed(gate: npt.NDArray[np.bool_] | None, images: int) -> npt.NDArray[np.bool_]:
    if gate is None:
        return np.zeros((0, images, 1), np.bool_)
    return np.ascontiguousarray(gate, dtype=np.bool_)


def _blocks(window: Window, images: int) -> int:
    """Into how many runs of rows an image is cut, so that each thread has a few."""
    wanted = -(-_UNITS_PER_THREAD * numba.get_num_threads() // images)
    return min(max(wanted, 1), window.out_height)


@numba.njit(cache=True)
def _lines_under(window, y):
    """First line of the map under the window of target line y, its row in the window, how many."""
    above = y * window.stride_y - window.padding_y
    low = max(-above, 0)
    return above + low, low, min(window.kernel_height, window.height - above) - low


@numba.njit(cache=True)
def _columns_under(window, x):
    """Left edge of the window, the first column inside the map, bytes of its list of starts."""
    left = x * window.stride_x - window.padding_x
    begin = max(left, 0)
    return left, begin, 4 * (min(left + window.kernel_width, window.width) - begin)


@numba.njit(cache=True)
def settle(counts, fired, spikes, first, count):
    """Copy the spikes of a tile that is not full to their row; how many there are."""
    if count == len(fired):
        return counts & 0xFF
    found = np.int64(0)
    for o in range(count):
        spikes[first + o] = fired[o]
        found += fired[o]
    return found


@numba.njit(cache=True)
def clear_closed(gate, b, first, last, spikes):
    """Set the spikes of an image at closed places, of those from `first` to before `last`."""
    for t in range(len(spikes) if len(gate) else 0):
        for place in range(first, last):
            if not gate[t % len(gate), b, place]:
                row = spikes[t, b, place]
                for o in range(len(row)):
                    row[o] = 0


@numba.njit(parallel=True, cache=True)
def _sum(index, value, starts, gate, packed, window, factor_shift, mode, blocks, out):
    steps, images, _, outputs = out.shape
    tiles, tile = packed.shape[0], packed.shape[3]
    taps = packed.shape[2]
    lines = (window.out_height + blocks - 1) // blocks
    index_at, value_at = np.int64(index.ctypes.data), np.int64(value.ctypes.data)
    starts_at, packed_at = np.int64(starts.ctypes.data), np.int64(packed.ctypes.data)
    room, list_room = 4 * index.shape[2], 4 * value.shape[2]
    starts_room = 4 * starts.shape[2]
    for unit in numba.prange(images * blocks):
        b, top = unit // blocks, (unit % blocks) * lines
        sums = np.zeros(tile, np.int32)
        sums_at = np.int64(sums.ctypes.data)
        for part in range(tiles):
            first = part * tile
            count = min(tile, outputs - first)
            for y in range(top, min(top + lines, window.out_height)):
                line, low, rows = _lines_under(window, y)
                weights = packed_at + (part * window.kernel_height + low) * taps * tile
                for x in range(window.out_width):
                    place = y * window.out_width + x
                    left, begin, span = _columns_under(window, x)
                    corner = 4 * (line * window.width + begin)
                    shifted = weights - left * window.channels * tile
                    for t in range(steps):
                        target = out[t, b, place]
                        if len(gate) and not gate[t % len(gate), b, place]:
                            continue
                        s = (t % len(starts)) * images + b
                        gather(
                            mode, tile, shifted, rows, taps * tile, 4 * window.width,
                            starts_at + s * starts_room + corner, span,
                            index_at + s * room, value_at + s * list_room, sums_at,
                        )  # fmt: skip
                        for o in range(count):
                            target[first + o] = sums[o] << factor_shift


@numba.njit(parallel=True, cache=True)
def _fire(
    index, value, starts, gate, packed, window, mode, blocks,
    bias, shift, halving, threshold, spikes, found, idle, saturated,
):  # fmt: skip
    steps, images, places, outputs = spikes.shape
    tiles, tile = packed.shape[0], packed.shape[3]
    taps = packed.shape[2]
    lines = (window.out_height + blocks - 1) // blocks
    still = mode == PRODUCTS or len(starts) < steps
    index_at, value_at = np.int64(index.ctypes.data), np.int64(value.ctypes.data)
    starts_at, packed_at = np.int64(starts.ctypes.data), np.int64(packed.ctypes.data)
    room, list_room = 4 * index.shape[2], 4 * value.shape[2]
    starts_room = 4 * starts.shape[2]
    bias_at, spikes_at = np.int64(bias.ctypes.data), np.int64(spikes.ctypes.data)
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
            for y in range(top, bottom):
                line, low, rows = _lines_under(window, y)
                weights = packed_at + (part * window.kernel_height + low) * taps * tile
                for x in range(window.out_width):
                    place = y * window.out_width + x
                    left, begin, span = _columns_under(window, x)
                    corner = 4 * (line * window.width + begin)
                    shifted = weights - left * window.channels * tile
                    voltage[:] = 0
                    summed = -1
                    for t in range(steps):
                        if len(gate) and not gate[t % len(gate), b, place]:
                            continue
                        s = (t % len(starts)) * images + b
                        target = fired_at
                        if count == tile:
                            target = (
                                spikes_at + ((t * images + b) * places + place) * outputs + first
                            )
                        if still:
                            if summed != s:
                                gather(
                                    mode, tile, shifted, rows, taps * tile, 4 * window.width,
                                    starts_at + s * starts_room + corner, span,
                                    index_at + s * room, value_at + s * list_room, sums_at,
                                )  # fmt: skip
                                summed = s
                            counts = fire(
                                4, tile, sums_at, shift, halving, threshold, drive, voltage_at,
                                target,
                            )  # fmt: skip
                        else:
                            counts = gather_and_fire(
                                mode, tile, shifted, rows, taps * tile, 4 * window.width,
                                starts_at + s * starts_room + corner, span, index_at + s * room,
                                shift, halving, threshold, drive, voltage_at, target,
                            )  # fmt: skip
                        row = spikes[t, b, place]
                        found[t, b, place] += settle(counts, fired, row, first, count)
                        quiet += (counts >> IDLE_SHIFT) & 0xFF
                        clipped += counts >> SATURATED_SHIFT
        idle[b, unit % blocks] = quiet
        saturated[b, unit % blocks] = clipped
