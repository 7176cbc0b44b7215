"""The training loss: task, ponder, gates and prior; kept tokens and teacher of the rivals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atsnn.config import SelectionConfig, TrainConfig
from atsnn.distributed import mean_of_all
from atsnn.spikformer import ModelOutput

PRIOR_WIDTH = 0.15
"""Standard deviation of the prior over cells, as a share of the way from first to last."""


def total_loss(output: ModelOutput, targets: Tensor, config: TrainConfig, adaptive: bool) -> Tensor:
    """Cross-entropy with soft `targets` [B, classes], plus the halting losses if `adaptive`."""
    loss = functional.cross_entropy(output.logits, targets.to(output.logits.dtype))
    if not adaptive:
        return loss
    loss = loss + config.ponder_weight * output.ponder.mean()
    if config.gate_weight:
        excess = (mean_of_all(output.gates.mean()) - config.gate_target).clamp(min=0)
        loss = loss + config.gate_weight * excess
    if config.prior_weight:
        loss = loss + config.prior_weight * prior_divergence(output.scores, config.prior_center)
    return loss


def selection_loss(
    output: ModelOutput, selection: SelectionConfig, config: TrainConfig
) -> Tensor | float:
    """SparseSpikformer's loss on the kept tokens; 0 for methods that keep a fixed number.

    `ratio_weight` times the mean over images and blocks of (kept share - wanted share)^2.
    """
    if selection.method != "sparse-spikformer" or not config.ratio_weight:
        return 0.0
    kept = output.gates[:, 0].mean(2)
    wanted = kept.new_tensor(selection.keep)[:, None]
    return config.ratio_weight * (kept - wanted).square().mean()


def teacher_loss(output: ModelOutput, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || model) of the class probabilities, mean over images; logits [B, classes]."""
    wanted = functional.log_softmax(teacher_logits.double(), 1)
    ours = functional.log_softmax(output.logits.double(), 1)
    return functional.kl_div(ours, wanted, reduction="batchmean", log_target=True)


def prior_divergence(scores: Tensor, center: float) -> Tensor:
    """KL(prior || mean halting scores), both normalised over the cells (l, t).

    Args:
        scores: [L, T, B, N].
        center: place of the prior's peak on the way from the first cell (0) to the last (1).
    """
    mean = mean_of_all(scores.mean((2, 3)))
    share = (mean / mean.sum().clamp(min=1e-6)).clamp(min=1e-6)
    prior = cell_prior(mean.shape[0], mean.shape[1], center).to(share)
    return (prior * (prior / share).log()).sum()


def cell_prior(blocks: int, steps: int, center: float) -> Tensor:
    """Gaussian over the cells [L, T], sums to 1; a cell lies at the mean of its two shares."""
    places = torch.linspace(0, 1, blocks)[:, None] / 2 + torch.linspace(0, 1, steps) / 2
    density = torch.exp(-0.5 * ((places - center) / PRIOR_WIDTH) ** 2).clamp(min=1e-6)
    return density / density.sum()
