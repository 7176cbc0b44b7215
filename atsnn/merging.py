"""Merging of similar tokens: bipartite soft matching between attention and MLP.

Even tokens find their best odd token by cosine similarity; the most similar edges merge. One
assignment per image and block, taken at the first step and latched, so that it is causal and every
neuron keeps its identity. After ToMe (Bolya et al. 2023, arXiv 2210.09461); the spiking form is a
reconstruction of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atsnn.fixed_point import MERGE_UNITY


@dataclass(frozen=True)
class Assignment:
    """Who merges into whom: `pairs` [B, Nb, Na] is 1 where even token a joins odd token b."""

    pairs: Tensor


@torch.no_grad()
def match_tokens(
    features: Tensor, eligible: Tensor, count: int, minimum_similarity: float
) -> Assignment:
    """Choose the merging edges from `features` [T, B, N, D] summed over T, in float64.

    Compared is the square of the cosine, `dot |dot| / (|a|^2 |b|^2)`: from integer features every
    sum is exact and a quotient is correctly rounded everywhere (a square root is not: torch's may
    be one unit off), so every executor chooses the same edges. Ties go to the lower index.

    Args:
        eligible: bool [B, N].
        count: most edges per image; 0 for no limit.
        minimum_similarity: least cosine similarity of an edge; it must be above 0 in any case.
    """
    even, odd = features[:, :, 0::2].double(), features[:, :, 1::2].double()
    dot = torch.einsum("tbad,tbcd->bac", even, odd)
    norm_even, norm_odd = even.square().sum((0, 3)), odd.square().sum((0, 3))
    even_ok = eligible[:, 0::2] & (norm_even > 0)
    odd_ok = eligible[:, 1::2] & (norm_odd > 0)
    allowed = even_ok[:, :, None] & odd_ok[:, None, :]
    product = norm_even[:, :, None] * norm_odd[:, None, :]
    similarity = torch.where(allowed, dot * dot.abs() / product.clamp(min=1e-300), -1.0)
    best, partner = similarity.max(dim=2)
    candidate = (best > 0) & (best >= minimum_similarity**2)
    index = torch.arange(best.shape[1], device=best.device)
    ahead = (best[:, :, None] > best[:, None, :]) | (
        (best[:, :, None] == best[:, None, :]) & (index[:, None] < index[None, :])
    )
    rank = (ahead & candidate[:, :, None]).sum(1)
    merged = candidate & (rank < count) if count else candidate
    pairs = nn.functional.one_hot(partner, odd.shape[2]).transpose(1, 2) * merged[:, None, :]
    return Assignment(pairs.to(features.dtype))


def mean_weights(pairs: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Real weights in proportion to the sizes: of each a in its b [B, Nb, Na], of b [B, Nb]."""
    total = _total_size(pairs, size)
    weight_a = pairs * size[:, None, 0::2] / total[:, :, None]
    return weight_a, 1.0 - weight_a.sum(2)


def fixed_weights(pairs: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as the synaptic reduction holds them: integers out of 256, divided by 256."""
    total = _total_size(pairs, size)
    weight_a = torch.floor(MERGE_UNITY * pairs * size[:, None, 0::2] / total[:, :, None])
    return weight_a / MERGE_UNITY, 1.0 - weight_a.sum(2) / MERGE_UNITY


def _total_size(pairs: Tensor, size: Tensor) -> Tensor:
    return size[:, 1::2] + (pairs * size[:, None, 0::2]).sum(2)


def keep_value(value: Tensor) -> Tensor:
    """Rounding of the float model: none."""
    return value


def floor_straight_through(value: Tensor) -> Tensor:
    """Round down, as `>> 8` does; the gradient passes as if there were no rounding."""
    return value + (torch.floor(value) - value).detach()


class TokenMerging(nn.Module):
    """Merge the most similar open tokens of a residual stream [T, B, N, D].

    Args:
        count, minimum_similarity: see `match_tokens`.
        combine: `mean` (size-weighted), `max` (OR of the spikes that the stream counts), `keep`
            (the value of the largest token).
        similarity: features to compare, the `stream` or the attention `keys`.
        assignment: `first` (taken at t = 0, causal) or `all` (from all steps; not causal).
        weights, rounding: real or fixed-point form of the mean.
    """

    def __init__(
        self,
        count: int,
        minimum_similarity: float,
        combine: str,
        similarity: str,
        assignment: str,
        weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = mean_weights,
        rounding: Callable[[Tensor], Tensor] = keep_value,
    ) -> None:
        super().__init__()
        self.count = count
        self.minimum_similarity = minimum_similarity
        self.combine = combine
        self.similarity = similarity
        self.assignment = assignment
        self.weights = weights
        self.rounding = rounding

    def forward(
        self,
        x: Tensor,
        gate: Tensor,
        alive: Tensor | None = None,
        size: Tensor | None = None,
        keys: Tensor | None = None,
        latched: Assignment | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Assignment]:
        """Returns stream [T, B, N, D], gate [T, B, N], alive and size [B, N], and the assignment.

        `latched` is the assignment of an earlier step; without it one is made.
        """
        if alive is None:
            alive = torch.ones_like(gate[0])
        if size is None:
            size = torch.ones_like(gate[0])
        if latched is None:
            features = x if self.similarity == "stream" or keys is None else keys
            seen = features[:1] if self.assignment == "first" else features
            eligible = torch.gt(gate[0], 0) & torch.gt(alive, 0)
            latched = match_tokens(seen, eligible, self.count, self.minimum_similarity)
        pairs = latched.pairs
        merged = COMBINATIONS[self.combine](self, x, pairs, size)
        stayed = torch.ones_like(alive)
        stayed[:, 0::2] -= pairs.sum(1)
        new_size = size * stayed
        new_size[:, 1::2] = _total_size(pairs, size)
        out = torch.stack([x[:, :, 0::2], _padded(merged, x)], dim=3).flatten(2, 3)
        return out[:, :, : x.shape[2]], gate * stayed, alive * stayed, new_size, latched


def _padded(odd: Tensor, x: Tensor) -> Tensor:
    """Odd tokens, with a zero token behind them if there is one even token more."""
    missing = x.shape[2] - 2 * odd.shape[2]
    return nn.functional.pad(odd, (0, 0, 0, missing))


def _combine_mean(layer: TokenMerging, x: Tensor, pairs: Tensor, size: Tensor) -> Tensor:
    weight_a, weight_b = layer.weights(pairs, size)
    moved = torch.einsum("bca,tbad->tbcd", weight_a, x[:, :, 0::2])
    return layer.rounding(moved + weight_b[None, :, :, None] * x[:, :, 1::2])


def _combine_max(layer: TokenMerging, x: Tensor, pairs: Tensor, size: Tensor) -> Tensor:
    joined = (pairs[None, :, :, :, None] * x[:, :, None, 0::2]).amax(3)
    return torch.maximum(x[:, :, 1::2], joined)


def _combine_keep(layer: TokenMerging, x: Tensor, pairs: Tensor, size: Tensor) -> Tensor:
    largest, winner = (pairs * size[:, None, 0::2]).max(2)
    index = winner[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
    candidate = x[:, :, 0::2].gather(2, index)
    replace = (largest > size[:, 1::2])[None, :, :, None]
    return torch.where(replace, candidate, x[:, :, 1::2])


COMBINATIONS = {"mean": _combine_mean, "max": _combine_max, "keep": _combine_keep}
