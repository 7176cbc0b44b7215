"""Or-pooling of spikes."""

from __future__ import annotations

import numba
import numpy as np

from hardware.engine.rows import Array

Pair = tuple[int, int]


def pool_spikes(maps: Array, kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """Whether any spike of bool maps [M, C, H, W] lies in each window, bool [M, C, H', W']."""
    m, c, *size = maps.shape
    height, width = (
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)
    )
    out = np.empty((m * c, height, width), np.bool_)
    planes = np.ascontiguousarray(maps).view(np.uint8).reshape(m * c, *size)
    _pool(planes, kernel, stride, padding, out.view(np.uint8))
    return out.reshape(m, c, height, width)


@numba.njit(parallel=True, cache=True)
def _pool(planes, kernel, stride, padding, out):
    _, height, width = planes.shape
    for m in numba.prange(len(planes)):
        line = np.zeros(width + 2 * padding[1], np.uint8)
        inside = line[padding[1] : padding[1] + width]
        for y in range(out.shape[1]):
            top = y * stride[0] - padding[0]
            inside[:] = 0
            for row in range(max(top, 0), min(top + kernel[0], height)):
                for x in range(width):
                    inside[x] |= planes[m, row, x]
            left = 0
            for x in range(out.shape[2]):
                fires = np.uint8(0)
                for column in range(left, left + kernel[1]):
                    fires |= line[column]
                out[m, y, x] = fires
                left += stride[1]
