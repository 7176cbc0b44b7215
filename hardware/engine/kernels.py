"""Integer kernels on numpy arrays: exact products through BLAS, windows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from atsnn.fixed_point import EXACT_FLOAT32
from hardware.errors import EngineError

Array = npt.NDArray
EXACT_FLOAT64 = 2**53
_CHUNK_BYTES = 4 * 2**20


def exact_dtype(name: str, weight: npt.NDArray, largest_input: int) -> type[np.floating]:
    """The narrowest float type in which a product with `weight` [O, ...] is exact in every order.

    Partial sums of a dot product are bounded by the largest row sum of |weight| times the largest
    |input|; below 2^24 every one of them is an integer that float32 holds, below 2^53 float64.

    Raises:
        EngineError: not even float64 holds the sums of layer `name`.
    """
    rows = np.abs(weight.reshape(weight.shape[0], -1).astype(np.int64)).sum(axis=1)
    reach = int(rows.max(initial=0)) * largest_input
    if reach < EXACT_FLOAT32:
        return np.float32
    if reach < EXACT_FLOAT64:
        return np.float64
    raise EngineError(f"{name}: sums of up to {reach} are beyond exact arithmetic (2^53)")


class Convolution:
    """Exact integer convolution of maps [M, C, H, W] -> int32 [M, O, H', W']."""

    def __init__(
        self,
        weight: Array,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        dtype: type[np.floating],
    ) -> None:
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.dtype = groups, dtype
        self.kernel = weight.shape[2], weight.shape[3]
        self.matrix = weight.reshape(groups, weight.shape[0] // groups, -1).astype(dtype)

    def __call__(self, maps: Array) -> npt.NDArray[np.int32]:
        height, width = self._output_size(maps.shape[2:])
        channels = self.matrix.shape[0] * self.matrix.shape[1]
        out = np.empty((len(maps), channels, height, width), np.int32)
        columns = self.groups * self.matrix.shape[2] * height * width
        chunk = max(1, _CHUNK_BYTES // (columns * np.dtype(self.dtype).itemsize))
        for start in range(0, len(maps), chunk):
            part = self._columns(maps[start : start + chunk], height * width)
            product = np.matmul(self.matrix, part)
            out[start : start + chunk] = product.reshape(-1, channels, height, width)
        return out

    def _output_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    def _columns(self, maps: Array, places: int) -> Array:
        """[m, groups, C/groups * kh * kw, places]"""
        windows = dilated_windows(
            padded(maps, self.padding, self.dtype), self.kernel, self.stride, self.dilation
        )
        return np.ascontiguousarray(windows.transpose(0, 1, 4, 5, 2, 3)).reshape(
            len(maps), self.groups, -1, places
        )


def padded(maps: Array, padding: tuple[int, int], dtype: npt.DTypeLike) -> Array:
    """Maps [M, C, H, W] with zeros round them, as `dtype`."""
    (vertical, horizontal), (m, c, h, w) = padding, maps.shape
    if not vertical and not horizontal:
        return maps.astype(dtype, copy=False)
    out = np.zeros((m, c, h + 2 * vertical, w + 2 * horizontal), dtype)
    out[:, :, vertical : vertical + h, horizontal : horizontal + w] = maps
    return out


def dilated_windows(
    maps: Array, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Array:
    """View [M, C, H', W', kh, kw] of padded maps [M, C, H, W]."""
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    windows = sliding_window_view(maps, reach, axis=(2, 3))  # pyright: ignore[reportCallIssue, reportArgumentType]  (its stub lacks tuples)
    return windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def window_hits(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> npt.NDArray[np.int64]:
    """In how many windows each pixel lies, int64 [H, W]."""
    axes = [_axis_hits(*axis) for axis in zip(size, kernel, stride, padding, dilation, strict=True)]
    return np.outer(axes[0], axes[1])


def _axis_hits(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> npt.NDArray[np.int64]:
    hits = np.zeros(size, np.int64)
    windows = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    for offset in range(kernel):
        places = np.arange(windows) * stride + offset * dilation - padding
        hits[places[(places >= 0) & (places < size)]] += 1
    return hits


def or_pool(
    maps: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Array:
    """Maximum over windows of maps [M, C, H, W]; padding counts as 0."""
    ground = padded(maps, padding, maps.dtype)
    windows = dilated_windows(ground, kernel, stride, (1, 1))
    out = windows[..., 0, 0].copy()
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            np.maximum(out, windows[..., i, j], out=out)
    return out
