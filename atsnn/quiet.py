"""Channel 0 of the stem as a fixed detector of quiet tokens: those with few spikes halt.

At the first step a token of the position branch receives a current that falls with the number of
spikes around it, and its neuron fires if they are few. Neurons fire less at the first step than
later, so that hardly any token is found quiet afterwards. Ours, not AT-SNN's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atsnn.errors import ConfigError
from atsnn.layers import ConvLayer
from atsnn.spikformer import Spikformer, Stem

CURRENT_PER_SPIKE = 0.5
"""What one spike takes from the detector's current, in thresholds; trained weights are as large."""
NEVER_FIRES = -1.0


@torch.no_grad()
def detect_quiet_tokens(model: Spikformer, images: Tensor, share: float) -> None:
    """Turn channel 0 of a float model's stem into the detector.

    Args:
        images: [B, C, H, W] in [0, 1], or events, from which the number of spikes is chosen below
            which a token is quiet. share: of tokens to close at the first step.

    Raises:
        ConfigError: a stem without batch normalisation.
    """
    stem = model.stem
    last, position = stem.conv4.norm, stem.position.norm
    if not isinstance(last, nn.BatchNorm2d) or not isinstance(position, nn.BatchNorm2d):
        raise ConfigError("halting.quiet needs a stem with batch normalisation to start from")
    last.weight[0], last.bias[0] = 0.0, NEVER_FIRES
    kernel = stem.position.synapse.weight
    kernel[0] = 0.0
    kernel[0, 1:, kernel.shape[2] // 2, kernel.shape[3] // 2] = -1.0
    counts = _spikes_of_tokens(model, images)
    mean, deviation = counts.mean(), counts.std(correction=0)
    quiet = _limit(counts[0].flatten(), share)
    neuron = stem.position.neuron.model
    fires = neuron.threshold / neuron.membrane_rate  # a current above it, from zero potential
    position.weight[0] = CURRENT_PER_SPIKE * deviation
    position.bias[0] = fires + CURRENT_PER_SPIKE * (quiet - mean)
    assert position.running_mean is not None
    assert position.running_var is not None
    position.running_mean[0], position.running_var[0] = -mean, deviation.square()


def _limit(counts: Tensor, share: float) -> float:
    """The half number below which about `share` of the whole numbers `counts` lie."""
    value = float(counts.sort().values[min(int(share * len(counts)), len(counts) - 1)])
    return min(
        (value - 0.5, value + 0.5),
        key=lambda limit: abs(float((counts < limit).double().mean()) - share),
    )


def _spikes_of_tokens(model: Spikformer, images: Tensor) -> Tensor:
    """Number of spikes [T, B, H, W] in front of the position branch, in inference."""
    stem, seen = model.stem, list[Tensor]()

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(output)

    hook = stem.pool4.register_forward_hook(keep)
    training = stem.training
    stem.eval()
    try:
        stem(images)
    finally:
        stem.train(training)
        hook.remove()
    return seen[0].sum(2)


def keep_detector(model: Spikformer) -> None:
    """Keep the detector's parameters as they are in the training of a float or quantised model."""
    stem = model.stem.stem if model.quantized else model.stem
    assert isinstance(stem, Stem)
    for parameter in (*_detector(stem.conv4), *_detector(stem.position)):
        parameter.register_hook(_without_first)


def _detector(layer: ConvLayer | nn.Module) -> list[nn.Parameter]:
    """Parameters of a layer that have a row for each of its channels."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _without_first(gradient: Tensor) -> Tensor:
    rest = gradient.clone()
    rest[0] = 0.0
    return rest
