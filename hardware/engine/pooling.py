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
    planes = np.ascontiguousarray(maps).reshape(m * c, *size)
    _pool(planes, kernel, stride, padding, out)
    return out.reshape(m, c, height, width)


@numba.njit(parallel=True, cache=True)
def _pool(planes, kernel, stride, padding, out):
    _, height, width = planes.shape
    for m in numba.prange(len(planes)):
        line = np.empty(width, np.bool_)
        for y in range(out.shape[1]):
            top = y * stride[0] - padding[0]
            line[:] = False
            for row in range(max(top, 0), min(top + kernel[0], height)):
                for x in range(width):
                    line[x] |= planes[m, row, x]
            for x in range(out.shape[2]):
                left = x * stride[1] - padding[1]
                fires = False
                for column in range(max(left, 0), min(left + kernel[1], width)):
                    fires |= line[column]
                out[m, y, x] = fires
