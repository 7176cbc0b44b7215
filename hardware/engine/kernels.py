"""Integer kernels on numpy arrays: exact products through BLAS, windows, merging."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from atsnn.fixed_point import EXACT_FLOAT32, MERGE_UNITY
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


def matches(
    dots: npt.NDArray[np.float64],
    even_norms: npt.NDArray[np.float64],
    odd_norms: npt.NDArray[np.float64],
    even_eligible: npt.NDArray[np.bool_],
    odd_eligible: npt.NDArray[np.bool_],
    count: int,
    minimum_similarity: float,
) -> npt.NDArray[np.int64]:
    """Bipartite matching of even tokens onto odd ones, for B images at once.

    Args:
        dots: exact integer dot products, float64 [B, E, O].
        even_norms, odd_norms: exact squared norms, float64 [B, E] and [B, O].
        even_eligible, odd_eligible: bool, gate open, alive and norm above 0.
        count: at most so many merges per image; 0 with a minimum similarity above 0: no limit.

    Returns:
        int64 [B, E]: index of the odd token that an even token merges into, or -1.
    """
    norms = even_norms[:, :, None] * odd_norms[:, None, :]
    pairs = even_eligible[:, :, None] & odd_eligible[:, None, :]
    similarity = np.full(dots.shape, -1.0)
    met = dots[pairs]
    similarity[pairs] = met * np.abs(met) / norms[pairs]  # squared, see `atsnn.merging`
    if similarity.shape[2] == 0:
        return np.full(even_norms.shape, -1, np.int64)
    partner = similarity.argmax(axis=2)
    best = similarity.max(axis=2)
    candidate = (best > 0) & (best >= minimum_similarity**2)
    limit = count or best.shape[1]
    chosen = candidate & (_ranks(np.where(candidate, best, -np.inf)) < limit)
    return np.where(chosen, partner, -1)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rank of each entry of [B, E], largest first, the lower index first among equals."""
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(values.shape[1]), order.shape), 1)
    return ranks


def _turns(targets: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Places of `targets` in runs within which no target comes twice."""
    order = np.argsort(targets, kind="stable")
    first = np.searchsorted(targets[order], targets[order])
    turn = np.arange(len(targets)) - first
    for which in range(int(turn.max(initial=-1)) + 1):
        yield order[turn == which]


class Reduction:
    """The latched merges of a batch: which tokens join which, and with what weights.

    Attributes:
        image, giver, taker: int64 [pairs], one entry per merge (even token `giver` into `taker`).
        size, alive: int64 and bool [B, N] after merging.
    """

    def __init__(
        self,
        partner: npt.NDArray[np.int64],
        size: npt.NDArray[np.int64],
        alive: npt.NDArray[np.bool_],
        combine: str,
    ) -> None:
        self.combine = combine
        self.image, even = np.nonzero(partner >= 0)
        self.giver = 2 * even
        self.taker = 2 * partner[self.image, even] + 1
        given = np.zeros_like(size)
        np.add.at(given, (self.image, self.taker), size[self.image, self.giver])
        total = size + given
        self.giver_weight = (MERGE_UNITY * size[self.image, self.giver]) // np.maximum(
            total[self.image, self.taker], 1
        )
        self.weight_given = np.zeros_like(size)
        np.add.at(self.weight_given, (self.image, self.taker), self.giver_weight)
        self.size = total.copy()
        self.size[self.image, self.giver] = 0
        self.alive = alive.copy()
        self.alive[self.image, self.giver] = False
        self.original_size = size

    def __call__(self, stream: Array) -> Array:
        """Combine [T, B, N, D]; givers stay as they are."""
        out = stream.copy()
        if not len(self.image):
            return out
        if self.combine == "mean":
            self._mean(stream, out)
        elif self.combine == "max":
            for image, giver, taker in zip(self.image, self.giver, self.taker, strict=True):
                np.maximum(out[:, image, taker], stream[:, image, giver], out=out[:, image, taker])
        else:
            for image, token, source in self._largest():
                out[:, image, token] = stream[:, image, source]
        return out

    def _mean(self, stream: Array, out: Array) -> None:
        places, which = np.unique(np.stack([self.image, self.taker]), axis=1, return_inverse=True)
        image, taker = places
        kept = MERGE_UNITY - self.weight_given[image, taker]
        total = kept[:, None] * stream[:, image, taker].astype(np.int64)
        giving = self.giver_weight[:, None] * stream[:, self.image, self.giver].astype(np.int64)
        for turn in _turns(which.reshape(-1)):
            total[:, which.reshape(-1)[turn]] += giving[:, turn]
        out[:, image, taker] = total >> 8

    def _largest(self) -> Iterator[tuple[int, int, int]]:
        """(image, taker, token whose value it keeps); the taker wins ties, then the lower giver."""
        best: dict[tuple[int, int], int] = {}
        pairs: list[list[int]] = np.stack([self.image, self.giver, self.taker], axis=1).tolist()
        for image, giver, taker in pairs:
            kept = best.get((image, taker), taker)
            if self.original_size[image, giver] > self.original_size[image, kept]:
                kept = giver
            best[image, taker] = kept
        for (image, taker), kept in best.items():
            yield image, taker, kept
