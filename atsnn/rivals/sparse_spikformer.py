"""SparseSpikformer's spiking token selector (Liu et al., ICASSP 2024, arXiv 2311.08806).

In front of a block, features averaged over time go through a two-layer MLP to a keep and a drop
logit. Training draws a hard mask by Gumbel-softmax (straight-through), inference takes the top k.
One mask holds for all time steps, and a token once dropped stays out.

As published: selectors stand in front of blocks 2, 3, 4 and keep rho, rho^2, rho^3 of all tokens,
loss 2 * mean((kept share - target)^2) + 0.5 * KL to the dense teacher. Ours differs in two ways:
`selection.keep` says the share of every block, the first included, since a model of two blocks
could not go below half of its tokens otherwise; and a dropped token takes no part in anything (the
published training masks attention only).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from atsnn.distributed import drawn_for_all
from atsnn.rivals.selection import TokenSelection, over_time, top_tokens


class SpikingTokenSelector(TokenSelection):
    """A trained selector; with `keep` 1 it keeps every token and computes nothing.

    Args:
        dim: channels D. hidden: width of the MLP's first layer.
    """

    def __init__(self, tokens: int, keep: float, dim: int, hidden: int) -> None:
        super().__init__(tokens, keep)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        open_before = None if before is None else before[0]
        if self.kept == self.tokens:
            everything = x.new_ones(x.shape[1:3]) if open_before is None else open_before
            return over_time(everything, x)
        logits = self.logits(x)
        if self.training:
            mask = _hard_gumbel(logits)[..., 0]
            mask = mask if open_before is None else mask * open_before
        else:
            score = torch.log_softmax(logits, dim=2)[..., 0]
            mask = top_tokens(score, self.kept, open_before)
        return over_time(mask, x)

    def logits(self, x: Tensor) -> Tensor:
        """Keep and drop logit of each token, [T, B, N, D] -> [B, N, 2]."""
        return self.fc2(functional.gelu(self.fc1(x.mean(0) / self.unit)))

    def macs_per_image(self, steps: int, arriving: int) -> int:
        if self.kept == self.tokens:
            return 0
        return arriving * (self.fc1.weight.numel() + self.fc2.weight.numel())


def _hard_gumbel(logits: Tensor) -> Tensor:
    """Straight-through Gumbel-softmax over the last axis, as torch's, with the same draws for any
    number of processes: [B, N, 2] of 0 and 1, with the gradient of the softmax.
    """

    def exponential(rows: int) -> Tensor:
        return torch.empty(rows, *logits.shape[1:], device=logits.device).exponential_()

    noise = -drawn_for_all(exponential, len(logits)).log()
    soft = (logits + noise).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft
