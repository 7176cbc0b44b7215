"""Halting of tokens: scores, accumulators and gates, extended over blocks and time steps.

    h_k^{l,t} = sigmoid(gamma * x_{k,0}^{l,t} + beta)      l = 0 is the stem
    gate_k(l, t) = 1 while the accumulated score is below 1 - epsilon

Reconstruction: the orders and the upstream default are ours (AT-SNN-style, arXiv 2408.12293).
"""

from __future__ import annotations

import torch
from norse.torch.functional.threshold import threshold as spike
from torch import Tensor, nn

from atsnn.neurons import SURROGATE, SURROGATE_SLOPE

LOOK_BACK_ORDERS = frozenset({"rectangle", "raster", "steps"})
"""Orders whose gates need what their own or a later block has yet to produce."""


class HaltingScore(nn.Module):
    """Score of each token from channel 0 of the residual stream, [T, B, N, D] -> [T, B, N]."""

    def __init__(self, gamma: float, beta: float, learn: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(gamma), requires_grad=learn)
        self.beta = nn.Parameter(torch.tensor(beta), requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gamma * x[..., 0] + self.beta)


class Gate(nn.Module):
    """Opens [T, B, N] while the accumulated score is below `threshold`.

    Halting is itself a neuron: no leak, no reset, with norse's surrogate gradient, so that the task
    loss reaches the halting decision.

    Args:
        threshold: 1 - epsilon, in units of the score.
        unit: value of the score that stands for 1 (1 for float, 4096 for fixed point).
        accumulate: sum scores over time steps (all orders except `blocks`).
    """

    def __init__(self, threshold: float, unit: float, accumulate: bool) -> None:
        super().__init__()
        self.threshold = threshold
        self.unit = unit
        self.accumulate = accumulate

    def forward(
        self, score: Tensor, alive: Tensor | None = None, carried: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate for `score` [T, B, N] on top of what was `carried` [B, N] from earlier steps.

        Returns the gate (0 or 1) and the accumulator, both [T, B, N]. `alive` [B, N] is 0 for
        tokens that were merged away.
        """
        total = score.cumsum(0) if self.accumulate else score
        if carried is not None:
            total = total + carried
        gate = spike((self.threshold - total) / self.unit, SURROGATE, SURROGATE_SLOPE)
        return (gate if alive is None else gate * alive), total


def ponder(gates: Tensor, totals: Tensor, unit: float) -> Tensor:
    """Cost of each token [B, N]: active cells plus remainder (ACT, Graves 2016).

    Args:
        gates, totals: [L, T, B, N]; accumulators in units of `unit`.
    """
    reached = (totals / unit * gates.detach()).amax(dim=(0, 1)).clamp(max=1.0)
    return gates.sum(dim=(0, 1)) + 1.0 - reached
