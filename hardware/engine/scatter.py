"""Event-driven convolution: each non-zero pixel adds its weights to the windows that it lies in.

The sums of a map are kept with channels last and a margin as wide as the kernel, so that the taps
of one kernel row are one contiguous run of `kernel width * channels` and no border needs a test.
"""

from __future__ import annotations

import numba
import numpy as np

from hardware.engine.rows import Array, NarrowWeights, active


class Scatter:
    """Convolution of stride 1 without dilation or groups, of maps [M, C, H, W]."""

    def __init__(self, weight: Array, padding: tuple[int, int], largest_sum: int) -> None:
        self.outputs, self.channels, *kernel = weight.shape
        self.kernel, self.padding = (kernel[0], kernel[1]), padding
        flipped = weight[:, :, ::-1, ::-1].transpose(1, 2, 3, 0)
        self.weights = NarrowWeights(flipped.reshape(self.channels * kernel[0], -1), largest_sum)

    def __call__(self, maps: Array) -> Array:
        """int32 [M, O, H', W'] of bool or int32 maps, contiguous."""
        height, width = (
            n + 2 * p - k + 1
            for n, p, k in zip(maps.shape[2:], self.padding, self.kernel, strict=True)
        )
        out = np.empty((len(maps), self.outputs, height, width), np.int32)
        _scatter(
            maps,
            self.weights.rows.reshape(self.channels, self.kernel[0], -1),
            self.weights.accumulator,
            self.weights.factor,
            maps.dtype != np.bool_,
            (self.kernel[0] - 1 - self.padding[0], self.kernel[1] - 1 - self.padding[1]),
            self.kernel[1],
            out,
        )
        return out


@numba.njit(parallel=True, cache=True)
def _scatter(maps, weight, like, factor, graded, corner, kernel_width, out):
    count, channels, height, width = maps.shape
    outputs = out.shape[1]
    tall = height + weight.shape[1] - 1
    pitch = (width + kernel_width - 1) * outputs
    places = _places(height, width, outputs, pitch)
    for m in numba.prange(count):
        total = np.zeros(tall * pitch, like.dtype)
        index = np.empty(height * width + 1, np.int32)
        for c in range(channels):
            plane = maps[m, c].reshape(-1)
            found = active(plane, index)
            for i in index[:found]:
                if graded:
                    _add_times(total, weight[c], places[i], pitch, plane[i])
                else:
                    _add(total, weight[c], places[i], pitch)
        _crop(total.reshape(tall, pitch), factor, corner, out[m])


@numba.njit(cache=True)
def _places(height, width, outputs, pitch):
    """Where the sums begin that a pixel adds to."""
    places = np.empty(height * width, np.int64)
    for y in range(height):
        for x in range(width):
            places[y * width + x] = y * pitch + x * outputs
    return places


@numba.njit(cache=True)
def _add(total, taps, start, pitch):
    run = taps.shape[1]
    for ky in range(taps.shape[0]):
        line = total[start + ky * pitch : start + ky * pitch + run]
        tap = taps[ky]
        for o in range(run):
            line[o] += tap[o]


@numba.njit(cache=True)
def _add_times(total, taps, start, pitch, value):
    run = taps.shape[1]
    times = total.dtype.type(value)
    for ky in range(taps.shape[0]):
        line = total[start + ky * pitch : start + ky * pitch + run]
        tap = taps[ky]
        for o in range(run):
            line[o] += tap[o] * times


@numba.njit(cache=True)
def _crop(total, factor, corner, out):
    """Without the margin, channels first."""
    outputs, height, width = out.shape
    for y in range(height):
        line = total[y + corner[0]]
        for o in range(outputs):
            at = corner[1] * outputs + o
            for x in range(width):
                out[o, y, x] = np.int32(line[at]) * factor
                at += outputs
