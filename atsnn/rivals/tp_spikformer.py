"""TP-Spikformer's token score (Wei et al., ICLR 2026, arXiv 2603.00527); no training.

A token is worth processing where it differs from its neighbourhood, `1 - cos(token, mean of the k x
k tokens around it)`, and from itself a step earlier, `mean_d |x_t - x_(t-1)|`. Both are averaged
over time, scaled to 0 ... 1 within the image and added; the top k tokens run through the block,
the others keep their value and are put back, so that every block chooses among all tokens.

Reconstruction of ours where no text was at hand: the neighbourhood holds the token itself and ends
at the border; a zero token beside zero tokens is like them (cosine 1), beside others it is not (0).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from atsnn.rivals.selection import TokenSelection, over_time, top_tokens


class TokenPreference(TokenSelection):
    """Score from space and time.

    Args:
        dim: channels D. grid: rows and columns of tokens. neighbourhood: side k of the square.
    """

    def __init__(
        self, tokens: int, keep: float, dim: int, grid: tuple[int, int], neighbourhood: int
    ) -> None:
        super().__init__(tokens, keep)
        self.dim = dim
        self.grid = grid
        self.neighbourhood = neighbourhood

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        score = self.score(x.detach())
        return over_time(top_tokens(score, self.kept, None), x)

    def score(self, x: Tensor) -> Tensor:
        """[T, B, N, D] -> [B, N] in 0 ... 2, from whole numbers in float64."""
        x = x.double()
        total = _unit_range(self.spatial(x).mean(0))
        if len(x) > 1:
            total = total + _unit_range((x[1:] - x[:-1]).abs().mean(3).mean(0))
        return total

    def spatial(self, x: Tensor) -> Tensor:
        """1 - cosine with the neighbourhood's mean, [T, B, N, D] -> [T, B, N]."""
        maps = x.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)
        side = self.neighbourhood
        around = functional.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False)
        around = around.flatten(2).transpose(1, 2).view(x.shape)
        norms = x.norm(dim=3) * around.norm(dim=3)
        cosine = (x * around).sum(3) / norms.clamp(min=1e-300)
        both_zero = (x == 0).all(3) & (around == 0).all(3)
        return 1.0 - cosine.masked_fill(both_zero, 1.0)

    def macs_per_image(self, steps: int, arriving: int) -> int:
        """Three products per channel and step: the dot product and two norms."""
        return 0 if self.kept == self.tokens else 3 * steps * self.tokens * self.dim


def _unit_range(score: Tensor) -> Tensor:
    """Scale [B, N] to 0 ... 1 within each image; a constant score becomes 0."""
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    return (score - low) / (high - low).clamp(min=1e-12)
