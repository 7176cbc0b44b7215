"""Merging of tokens: which even token joins which odd one, and the synaptic reduction of both.

All sums are of integers. Similarities are compared squared, see `atsnn.merging`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import MERGE_UNITY
from hardware.engine import buffers
from hardware.engine.rows import Array

_SHIFT = MERGE_UNITY.bit_length() - 1
_MEAN, _MAX, _KEEP = range(3)
_COMBINE = {"mean": _MEAN, "max": _MAX, "keep": _KEEP}


@dataclass(frozen=True)
class Matches:
    """Who joins whom.

    Attributes:
        partner: int64 [B, E], the odd token (counted among the odd ones) that an even token joins,
            or -1.
        compared: bool [B, N], tokens that were eligible and not zero.
    """

    partner: npt.NDArray[np.int64]
    compared: npt.NDArray[np.bool_]


def match_tokens(
    values: Array,
    eligible: npt.NDArray[np.bool_],
    count: int,
    minimum_similarity: float,
    largest: int,
) -> Matches:
    """Bipartite matching of even tokens onto odd ones, for B images at once.

    Args:
        values: what is compared, bool or integers [S, B, N, D], summed over steps.
        eligible: bool [B, N], gate open and alive.
        count: at most so many merges per image; 0: no limit.
        minimum_similarity: cosine that an edge needs; it must be above 0 in any case.
        largest: bound of the magnitude of a value.
    """
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    steps, images, tokens, width = values.shape
    zero = np.int32(0) if steps * width * largest**2 < 2**31 else np.int64(0)
    partner = np.full((images, (tokens + 1) // 2), -1, np.int64)
    compared = eligible.copy()
    limit = count or partner.shape[1]
    _match(np.ascontiguousarray(values), zero, limit, minimum_similarity**2, partner, compared)
    return Matches(partner, compared)


@numba.njit(cache=True)
def _dot(values, b, n, m, zero):
    total = zero
    for t in range(len(values)):
        one, two = values[t, b, n], values[t, b, m]
        for d in range(len(one)):
            total = type(zero)(total + type(zero)(one[d]) * type(zero)(two[d]))
    return total


@numba.njit(parallel=True, cache=True)
def _match(values, zero, limit, floor, partner, compared):
    _, images, tokens, _ = values.shape
    evens, odds = (tokens + 1) // 2, tokens // 2
    for b in numba.prange(images):
        norms = np.zeros(tokens, np.float64)
        for n in range(tokens):
            if compared[b, n]:
                norms[n] = np.float64(_dot(values, b, n, n, zero))
                compared[b, n] = norms[n] > 0
        best = np.full(evens, -1.0)
        for a in range(evens):
            if not compared[b, 2 * a]:
                continue
            for o in range(odds):
                if not compared[b, 2 * o + 1]:
                    continue
                dot = np.float64(_dot(values, b, 2 * a, 2 * o + 1, zero))
                similarity = dot * abs(dot) / (norms[2 * a] * norms[2 * o + 1])
                if similarity > best[a]:
                    best[a] = similarity
                    partner[b, a] = o
        for a in range(evens):
            if not (best[a] > 0 and best[a] >= floor):
                best[a] = -1.0
        for a in range(evens):
            ahead = 0
            for other in range(evens):
                ahead += best[other] > best[a] or (best[other] == best[a] and other < a)
            if best[a] < 0 or ahead >= limit:
                partner[b, a] = -1


class Reduction:
    """The latched merges of a batch.

    Attributes:
        partner: int64 [B, E], as in `Matches`.
        size, alive: int64 and bool [B, N] after merging.
        involved: bool [B, N], tokens that join another or are joined.
    """

    def __init__(
        self,
        partner: npt.NDArray[np.int64],
        size: npt.NDArray[np.int64],
        alive: npt.NDArray[np.bool_],
        combine: str,
    ) -> None:
        self.partner, self.size, self.alive = partner, size.copy(), alive.copy()
        self.involved = np.zeros(alive.shape, np.bool_)
        self._combine = _COMBINE[combine]
        self._weights = np.zeros(size.shape, np.int32)
        self._source = np.zeros(size.shape, np.int64)
        _latch(partner, size, self.size, self.alive, self.involved, self._weights, self._source)

    def __call__(self, stream: Array) -> Array:
        """Combine integers [S, B, N, D]; tokens that join another stay as they are."""
        stream = np.ascontiguousarray(stream)
        out = buffers.empty(stream.shape, stream.dtype)
        zero = np.int32(0) if stream.dtype.itemsize <= 2 else np.int64(0)
        _reduce(stream, self.partner, self._weights, self._source, self._combine, zero, out)
        return out


@numba.njit(cache=True)
def _latch(partner, before, size, alive, involved, weights, source):
    """Sizes, and for every token its weight, out of 256, and the token whose value it keeps."""
    images, evens = partner.shape
    tokens = before.shape[1]
    for b in range(images):
        for n in range(tokens):
            source[b, n] = n
            weights[b, n] = MERGE_UNITY
        for a in range(evens):
            if partner[b, a] >= 0:
                taker = 2 * partner[b, a] + 1
                size[b, taker] += before[b, 2 * a]
                size[b, 2 * a] = 0
                alive[b, 2 * a] = False
                involved[b, 2 * a] = involved[b, taker] = True
                if before[b, 2 * a] > before[b, source[b, taker]]:
                    source[b, taker] = 2 * a
        for a in range(evens):
            if partner[b, a] >= 0:
                taker = 2 * partner[b, a] + 1
                share = (MERGE_UNITY * before[b, 2 * a]) // max(size[b, taker], 1)
                weights[b, 2 * a] = share
                weights[b, taker] -= share


@numba.njit(parallel=True, cache=True)
def _reduce(stream, partner, weights, source, combine, zero, out):
    steps, images, tokens, width = stream.shape
    for item in numba.prange(steps * images):
        t, b = item // images, item % images
        values, made = stream[t, b], out[t, b]
        for n in range(tokens):
            kept = values[source[b, n]] if combine == _KEEP else values[n]
            for d in range(width):
                made[n, d] = kept[d]
        if combine == _KEEP:
            continue
        total = np.zeros(width, np.int64)
        for taker in range(1, tokens, 2):
            own, joined = type(zero)(weights[b, taker]), False
            for a in range(len(partner[b])):
                if 2 * partner[b, a] + 1 != taker:
                    continue
                given = values[2 * a]
                if combine == _MAX:
                    for d in range(width):
                        made[taker, d] = max(made[taker, d], given[d])
                    continue
                share = type(zero)(weights[b, 2 * a])
                for d in range(width):
                    total[d] += share * given[d]
                joined = True
            if joined:
                for d in range(width):
                    made[taker, d] = (total[d] + own * values[taker, d]) >> _SHIFT
                    total[d] = 0
