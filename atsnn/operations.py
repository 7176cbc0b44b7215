"""Synaptic operations as a loss: training for few spikes where spikes are dear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atsnn.evaluation import SYNAPTIC_LAYERS, layer_name
from atsnn.spikformer import Spikformer

PIXELS = "stem.conv1"
"""The layer that sees pixels, which no training makes fewer."""


@dataclass
class _Sum:
    operations: Tensor | float = 0.0
    dense: float = 0.0


@contextmanager
def operation_share(model: Spikformer) -> Iterator[Callable[[], Tensor]]:
    """Watch one forward pass; a call then gives its share of synaptic operations, with a gradient.

    The share is of the operations that the same pass would cost if every input fired. A spike
    costs as many as it has synapses (borders of maps left out); a value of the residual stream
    counts as one spike at most, a closed token not at all. Pixels and attention are not counted.
    """
    unit = 2**model.config.quantization.fraction_bits if model.quantized else 1
    found = _Sum()

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, gate = inputs[0], inputs[1] if len(inputs) > 1 else None
        fan_out = _fan_out(module)
        maps = x.dim() == 5  # of the stem: spikes alone
        spikes = x if maps else (x / unit).clamp(max=1.0)
        if isinstance(gate, Tensor):
            spikes = spikes * gate[..., None]
        found.operations = found.operations + fan_out * spikes.sum(dtype=torch.float32)
        found.dense += fan_out * x.numel()

    hooks = [
        module.register_forward_pre_hook(watch)
        for name, module in model.named_modules()
        if isinstance(module, SYNAPTIC_LAYERS) and layer_name(name) != PIXELS
    ]
    try:
        yield lambda: torch.as_tensor(found.operations) / max(found.dense, 1.0)
    finally:
        for hook in hooks:
            hook.remove()


def _fan_out(layer: nn.Module) -> int:
    """Synapses of one input: outputs times places of the kernel."""
    weight = layer.synapse.weight  # pyright: ignore[reportAttributeAccessIssue] of SYNAPTIC_LAYERS
    assert isinstance(weight, Tensor)
    return weight.shape[0] * weight[0, 0].numel()
