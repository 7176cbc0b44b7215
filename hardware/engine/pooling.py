"""Or-pooling of spikes."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from hardware.engine import buffers
from hardware.engine.vectors import JOINED_LANES, join_bytes

Pair = tuple[int, int]


def pool_spikes(
    maps: npt.NDArray[np.bool_], kernel: Pair, stride: Pair, padding: Pair
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    """Whether any spike of maps [M, H, W, C] lies in each window.

    Returns:
        bool [M, H', W', C], and the spikes of each pixel, int32 [M, H' * W'].
    """
    count, *size, channels = maps.shape
    height, width = (
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)
    )
    out = buffers.zeros((count, height, width, channels), np.bool_)
    pool = _pool_lanes if channels % JOINED_LANES == 0 else _pool
    found = buffers.empty((count, height * width), np.int32)
    pool(maps.view(np.uint8), kernel, stride, padding, out.view(np.uint8), found)
    return out, found


@numba.njit(cache=True)
def _sum(spikes):
    total = np.int32(0)
    for c in range(len(spikes)):
        total += np.int32(spikes[c])
    return total


@numba.njit(parallel=True, cache=True)
def _pool(maps, kernel, stride, padding, out, found):
    count, height, width, channels = maps.shape
    for m in numba.prange(count):
        for y in range(out.shape[1]):
            top = y * stride[0] - padding[0]
            for x in range(out.shape[2]):
                left = x * stride[1] - padding[1]
                target = out[m, y, x]
                for row in range(max(top, 0), min(top + kernel[0], height)):
                    for column in range(max(left, 0), min(left + kernel[1], width)):
                        pixel = maps[m, row, column]
                        for c in range(channels):
                            target[c] |= pixel[c]
                found[m, y * out.shape[2] + x] = _sum(target)


@numba.njit(parallel=True, cache=True)
def _pool_lanes(maps, kernel, stride, padding, out, found):
    """Lines first, then the pixels of the line that they make, a pixel's channels in lanes."""
    count, height, width, channels = maps.shape
    size = width * channels
    for m in numba.prange(count):
        joined = np.empty(size, np.uint8)
        joined_at = np.int64(joined.ctypes.data)
        map_at, out_at = np.int64(maps[m].ctypes.data), np.int64(out[m].ctypes.data)
        for y in range(out.shape[1]):
            top = y * stride[0] - padding[0]
            joined[:] = 0
            for row in range(max(top, 0), min(top + kernel[0], height)):
                join_bytes(joined_at, map_at + row * size, size)
            for x in range(out.shape[2]):
                left = x * stride[1] - padding[1]
                target = out_at + (y * out.shape[2] + x) * channels
                for column in range(max(left, 0), min(left + kernel[1], width)):
                    join_bytes(target, joined_at + column * channels, channels)
                found[m, y * out.shape[2] + x] = _sum(out[m, y, x])
