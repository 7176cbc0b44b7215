"""Integer arithmetic of one time step and one image, as both grains of the Lava network use it.

numpy only, graph layout ([C, H, W], [N, D], [N]). Sums go through float64 matrix products, which
are exact here: every partial sum stays far below 2^53.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from atsnn.fixed_point import MERGE_UNITY, NeuronConstants, lif_step

Array = npt.NDArray
Pair = tuple[int, int]

WRAPS_ONCE = 2**18
"""Largest |activation| for which Lava's `LIFReset` is `fixed_point.lif_step`: a current of at most
2^23 and this `<< 6` wrap round the 24 bits once, and Lava's model wraps no second time."""


def _windows(maps: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Array:
    """View [C, H', W', kh, kw] of a map [C, H, W] with zeros around it."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    padded = np.pad(maps, ((0, 0), (ph, ph), (pw, pw)))
    reach = (dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    vertical_and_horizontal: Any = (1, 2)
    return sliding_window_view(padded, reach, axis=vertical_and_horizontal)[
        :, ::sh, ::sw, ::dh, ::dw
    ]


def convolve(
    maps: Array, weight: Array, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> npt.NDArray[np.int32]:
    """Convolution as torch has it, [C, H, W] with weight [O, C/groups, kh, kw] -> [O, H', W']."""
    kernel = (weight.shape[2], weight.shape[3])
    windows = _windows(maps, kernel, stride, padding, dilation)
    height, width = windows.shape[1:3]
    columns = windows.transpose(1, 2, 0, 3, 4).reshape(height * width, groups, -1)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1).astype(np.float64)
    sums = columns.transpose(1, 0, 2).astype(np.float64) @ kernels.transpose(0, 2, 1)
    return sums.transpose(0, 2, 1).reshape(-1, height, width).astype(np.int32)


def linear(values: Array, weight: Array) -> npt.NDArray[np.int32]:
    """`values` [N, I] or [I] times `weight` [O, I], int32 [N, O] or [O]."""
    return (values.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.int32)


def reshape(value: Array, to: Literal["tokens", "flatten"]) -> Array:
    """`tokens`: [C, H, W] -> [H*W, C], row-major; `flatten`: anything -> vector."""
    return value.reshape(value.shape[0], -1).T if to == "tokens" else value.reshape(-1)


def or_pool(maps: Array, kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """Largest value of each window; what lies outside the map counts as 0."""
    return _windows(maps, kernel, stride, padding, (1, 1)).max(axis=(3, 4))


def attention_table(k: Array, v: Array, heads: int) -> Array:
    """Fast weights of one time step: coincidences of k and v, float64 [heads, d, d]."""
    return _by_head(k, heads).transpose(0, 2, 1) @ _by_head(v, heads)


def attention_read(q: Array, table: Array) -> npt.NDArray[np.int32]:
    """Sum of the table rows that q selects, int32 [N, D]."""
    heads = table.shape[0]
    return (_by_head(q, heads) @ table).transpose(1, 0, 2).reshape(q.shape).astype(np.int32)


def _by_head(tokens: Array, heads: int) -> Array:
    return tokens.reshape(tokens.shape[0], heads, -1).transpose(1, 0, 2).astype(np.float64)


def neuron_bias(constants: NeuronConstants, dimensions: int) -> npt.NDArray[np.int32]:
    """Bias in a form that broadcasts: [C, 1, 1] for maps, [D] for tokens and vectors."""
    return constants.bias.reshape(-1, 1, 1) if dimensions == 3 else constants.bias


def neurons(
    current: npt.NDArray[np.int32],
    voltage: npt.NDArray[np.int32],
    activation: Array,
    constants: NeuronConstants,
    bias: Array,
    gate: Array | None = None,
) -> npt.NDArray[np.bool_]:
    """One step of LIF neurons; updates the state in place and returns the spikes.

    Args:
        gate: broadcastable to the state; where it is 0 the state is held and nothing fires.
    """
    after = lif_step(current, voltage, activation, constants, bias)
    if gate is None:
        current[...], voltage[...] = after.current, after.voltage
        return after.spikes
    is_open = gate.astype(bool)
    current[...] = np.where(is_open, after.current, current)
    voltage[...] = np.where(is_open, after.voltage, voltage)
    return after.spikes & is_open


@dataclass(frozen=True)
class Matching:
    """Which tokens merge into which: `partner` int [N], the token's target or -1 if it stays."""

    partner: npt.NDArray[np.int64]

    @property
    def stays(self) -> npt.NDArray[np.bool_]:
        return self.partner < 0

    def targets(self) -> dict[int, npt.NDArray[np.int64]]:
        """Tokens that absorb others, each with those others in rising order."""
        merging = self.partner[self.partner >= 0]
        return {int(b): np.flatnonzero(self.partner == b) for b in np.unique(merging)}


def match(features: Array, eligible: Array, count: int, minimum_similarity: float) -> Matching:
    """Bipartite matching of even tokens onto odd ones by cosine similarity.

    Args:
        features: integers [N, D].
        eligible: bool [N].
        count: largest number of merges; 0 for no limit.
        minimum_similarity: smallest similarity of a merge.
    """
    tokens = features.shape[0]
    partner = np.full(tokens, -1, np.int64)
    even, odd = np.arange(0, tokens, 2), np.arange(1, tokens, 2)
    if not len(odd):
        return Matching(partner)
    exact = features.astype(np.float64)
    norms = (exact * exact).sum(axis=1)
    usable = eligible & (norms > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        dots = exact[even] @ exact[odd].T
        squared = dots * np.abs(dots) / (norms[even][:, None] * norms[odd])
    squared[~(usable[even][:, None] & usable[odd])] = -np.inf
    best, value = squared.argmax(axis=1), squared.max(axis=1)
    ranked = np.lexsort((even, -value))
    ranked = ranked[(value[ranked] > 0) & (value[ranked] >= minimum_similarity**2)][: count or None]
    partner[even[ranked]] = odd[best[ranked]]
    return Matching(partner)


def merged_sizes(matching: Matching, size: Array) -> npt.NDArray[np.int64]:
    """Token sizes after the merge: the target has the sum, merged-away tokens have 0."""
    after = size.astype(np.int64)
    for b, others in matching.targets().items():
        after[b] += after[others].sum()
        after[others] = 0
    return after


def combine(
    matching: Matching, stream: Array, size: Array, how: Literal["mean", "max", "keep"]
) -> npt.NDArray[np.int64]:
    """Stream [N, D] in which every target holds the combination of itself and what it absorbed."""
    before = stream.astype(np.int64)
    after = before.copy()
    for b, others in matching.targets().items():
        if how == "mean":
            shares = (MERGE_UNITY * size[others].astype(np.int64)) // (size[b] + size[others].sum())
            own = (MERGE_UNITY - shares.sum()) * before[b]
            after[b] = (own + shares @ before[others]) >> 8
        elif how == "max":
            after[b] = np.maximum(before[b], before[others].max(axis=0))
        else:
            largest = others[size[others].argmax()]
            after[b] = before[b] if size[b] >= size[largest] else before[largest]
    return after
