"""Max pooling 3x3, stride 2, padding 1 on channels-last maps, for training on the CPU.

torch's gradient of `max_pool2d` goes to the first maximum of a window in row-major order; so it
does here. Channels are contiguous, so each window is nine vector operations.
"""

from __future__ import annotations

from typing import Any, cast

import numba
import numpy as np
import torch
from torch import Tensor

from atsnn.threads import KERNELS, use_torch_threads


@numba.njit(error_model="numpy")
def _take_larger(x, k, best, chosen):
    for j in range(x.size):
        larger = x[j] > best[j]
        best[j] = x[j] if larger else best[j]
        chosen[j] = k if larger else chosen[j]


@numba.njit(error_model="numpy")
def _add_where(grad, chosen, k, into):
    zero = grad.dtype.type(0.0)
    for j in range(grad.size):
        into[j] += grad[j] if chosen[j] == k else zero


@numba.njit(parallel=True, cache=True, error_model="numpy")
def pool(x, best, chosen):
    """x [M, H, W, C] -> best [M, H', W', C], and where in its window, uint8 of the same shape."""
    height, width = x.shape[1:3]
    rows = best.shape[1]
    for mr in numba.prange(x.shape[0] * rows):
        m, r = mr // rows, mr % rows
        for c in range(best.shape[2]):
            into, index = best[m, r, c], chosen[m, r, c]
            top, left = 2 * r - 1, 2 * c - 1
            first = max(0, -top) * 3 + max(0, -left)
            into[:] = x[m, max(0, top), max(0, left)]
            index[:] = first
            for k in range(first + 1, 9):
                h, w = top + k // 3, left + k % 3
                if 0 <= h < height and 0 <= w < width:
                    _take_larger(x[m, h, w], np.uint8(k), into, index)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def unpool(grad, chosen, result):
    """Gradient [M, H', W', C] to where each maximum was: result [M, H, W, C]."""
    rows, columns = grad.shape[1:3]
    height, width = result.shape[1:3]
    for mh in numba.prange(result.shape[0] * height):
        m, h = mh // height, mh % height
        for w in range(width):
            into = result[m, h, w]
            into[:] = 0.0
            for r in range(h // 2, min(rows, (h + 1) // 2 + 1)):
                for c in range(w // 2, min(columns, (w + 1) // 2 + 1)):
                    k = (h - 2 * r + 1) * 3 + (w - 2 * c + 1)
                    _add_where(grad[m, r, c], chosen[m, r, c], np.uint8(k), into)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        count, height, width, channels = maps.shape
        shape = (count, (height + 1) // 2, (width + 1) // 2, channels)
        best = maps.new_empty(shape)
        chosen = torch.empty(shape, dtype=torch.uint8)
        with KERNELS:
            use_torch_threads()
            pool(maps.numpy(), best.numpy(), chosen.numpy())
        ctx.save_for_backward(chosen)
        ctx.shape = maps.shape
        return best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (chosen,) = ctx.saved_tensors
        result = grads[0].new_empty(ctx.shape)
        with KERNELS:
            use_torch_threads()
            unpool(grads[0].contiguous().numpy(), chosen.numpy(), result.numpy())
        return result


def fits(maps: Tensor) -> bool:
    """True for float maps [M, C, H, W] on the CPU whose channels are contiguous in memory."""
    return (
        maps.device.type == "cpu"
        and maps.dtype in (torch.float32, torch.float64)
        and maps.is_contiguous(memory_format=torch.channels_last)
    )


def max_pool(maps: Tensor) -> Tensor:
    """`max_pool2d(maps, 3, 2, 1)` of channels-last maps [M, C, H, W], values and gradients."""
    pooled = cast("Tensor", _Pool.apply(maps.permute(0, 2, 3, 1)))
    return pooled.permute(0, 3, 1, 2)
