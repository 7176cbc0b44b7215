"""Read-outs over the first steps alone as a loss: training for images that leave early.

Temporal efficient training (TET, arXiv 2202.11946) and DT-SNN (arXiv 2305.17346) train every step's
read-out; here the read-outs over the first 1, 2, ... T-1 steps join the loss of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atsnn.spikformer import Spikformer


@contextmanager
def early_readouts(model: Spikformer) -> Iterator[Callable[[], list[Tensor]]]:
    """Watch one forward pass; a call then gives its read-outs over the first t steps, t < T.

    Each is [B, classes], with a gradient: what the same network would say if it had t steps
    (a quantised one up to the rounding of its bias).
    """
    seen: list[tuple[Any, ...]] = []
    readout = model.readout

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs)

    def found() -> list[Tensor]:
        x, *size = seen[-1]
        steps = len(x)
        means = [x[:t].mean(0, keepdim=True) for t in range(1, steps)]
        return [readout.forward(mean.expand(steps, *mean.shape[1:]), *size) for mean in means]

    hook = readout.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def early_loss(readouts: list[Tensor], targets: Tensor) -> Tensor:
    """Mean cross-entropy of the read-outs with soft `targets` [B, classes]; 0 for a single step."""
    losses = [functional.cross_entropy(logits, targets.to(logits.dtype)) for logits in readouts]
    return torch.stack(losses).mean() if losses else targets.new_zeros(())
