"""What all selections share: how many tokens are kept, and which of them by a score."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenSelection(nn.Module):
    """Base of the selections, for those who ask what a module is; it computes nothing.

    Args:
        tokens: number of tokens N. keep: share of them that is kept.

    Attributes:
        unit: integer that one spike counts on the residual stream (1 for float models).
    """

    def __init__(self, tokens: int, keep: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.keep = keep
        self.unit = 1.0

    @property
    def kept(self) -> int:
        """Number of tokens kept: the nearest integer to `keep * tokens`, at least 1."""
        return kept_tokens(self.tokens, self.keep)

    def macs_per_image(self, steps: int, arriving: int) -> int:
        """Multiplications that the decision takes for one image.

        Args:
            steps: time steps T. arriving: tokens that the block before processed.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, keep={self.keep}"


def kept_tokens(tokens: int, keep: float) -> int:
    """The nearest integer to `keep * tokens` (halves go up), at least 1."""
    return max(1, int(keep * tokens + 0.5))


def top_tokens(score: Tensor, count: int, before: Tensor | None) -> Tensor:
    """The `count` tokens of highest score, [B, N] -> 0 or 1 [B, N]; ties go to the lower index.

    Args:
        before: [B, N], 0 for tokens that may not be chosen.
    """
    if before is not None:
        score = score.masked_fill(before <= 0, float("-inf"))
    order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :count]
    chosen = torch.zeros_like(score).scatter_(1, order, 1.0)
    return chosen if before is None else chosen * (before > 0)


def over_time(mask: Tensor, x: Tensor) -> Tensor:
    """One mask [B, N] for all time steps of x [T, B, N, D], as [T, B, N]."""
    return mask.to(x.dtype).expand(x.shape[0], *mask.shape)
