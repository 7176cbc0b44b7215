"""Channel 0 of the stem as a fixed detector of quiet tokens: those with few spikes halt.

One more channel of the position branch learns, by ridge regression on a few hundred images, where a
token will rank among those of its image by the spikes that the branch fires at the first step; it
sees what the branch sees, the spikes of 3 x 3 tokens. Its current falls with that rank, so that its
neuron fires for quiet tokens. There are fewer spikes at the first step than later, so that hardly
any token is found quiet afterwards. Ours, not AT-SNN's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from atsnn.errors import ConfigError
from atsnn.frozen_stem import stem_of
from atsnn.spikformer import Spikformer

LARGEST_WEIGHT = 0.5
"""Of the detector, in thresholds a spike: as large as trained weights, which share its scale."""
RIDGE = 30.0
NEVER_FIRES = -1.0


@torch.no_grad()
def detect_quiet_tokens(model: Spikformer, images: Tensor, share: float) -> None:
    """Turn channel 0 of a float model's stem into the detector.

    Args:
        images: [B, C, H, W] in [0, 1], or events, to learn the detector from. share: of tokens to
            close at the first step.

    Raises:
        ConfigError: a stem without batch normalisation, or one that fires nothing.
    """
    stem = model.stem
    last, position = stem.conv4.norm, stem.position.norm
    if not isinstance(last, nn.BatchNorm2d) or not isinstance(position, nn.BatchNorm2d):
        raise ConfigError("halting.quiet needs a stem with batch normalisation to start from")
    last.weight[0], last.bias[0] = 0.0, NEVER_FIRES
    entering, spikes = _first_layer_of_tokens(model, images)
    kernel = stem.position.synapse.weight
    kernel[0] = _regression(entering[0], _rank(spikes[0]), kernel.shape[2])
    current = functional.conv2d(entering.flatten(0, 1), kernel[:1], padding=kernel.shape[2] // 2)
    mean, deviation = current.mean(), current.std(correction=0)
    quiet = current.unflatten(0, entering.shape[:2])[0].flatten().sort(descending=True).values
    limit = quiet[min(int(share * len(quiet)), len(quiet) - 1)]
    neuron = stem.position.neuron.model
    fires = neuron.threshold / neuron.membrane_rate  # a current above it, from zero potential
    position.weight[0], position.bias[0] = deviation, fires + mean - limit
    assert position.running_mean is not None
    assert position.running_var is not None
    position.running_mean[0], position.running_var[0] = mean, deviation.square()


def _rank(spikes: Tensor) -> Tensor:
    """Spikes [B, N] of each token -> its share of quieter tokens in the image, ties alike."""
    quieter = (spikes[:, None] < spikes[:, :, None]).double().mean(2)
    alike = (spikes[:, None] == spikes[:, :, None]).double().mean(2)
    return quieter + alike / 2


def _regression(maps: Tensor, rank: Tensor, side: int) -> Tensor:
    """Kernel [C, side, side] whose product with maps [B, C, H, W] falls as `rank` [B, N] rises."""
    windows = functional.unfold(maps, side, padding=side // 2).transpose(1, 2).flatten(0, 1)
    inputs = functional.pad(windows.double(), (0, 1), value=1.0)
    inputs = inputs.index_fill(1, torch.arange(side * side, device=maps.device), 0.0)  # channel 0
    gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], device=maps.device).double()
    weights = -torch.linalg.solve(gram, inputs.T @ rank.flatten())[:-1]
    largest = float(weights.abs().max())
    if largest == 0:
        raise ConfigError(
            f"halting.quiet: tokens of {len(maps)} training images have no spikes to count at the "
            "first step; start from a stem that was trained longer"
        )
    weights = weights * (LARGEST_WEIGHT / largest)
    return weights.view(maps.shape[1], side, side).to(maps.dtype)


def _first_layer_of_tokens(model: Spikformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """In inference: spikes [T, B, C, H, W] in front of the position branch, and how many each token
    gets from it, [T, B, N].
    """
    stem, seen = model.stem, dict[str, Tensor]()

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = output

        return hook

    hooks = [
        stem.pool4.register_forward_hook(keep("entering")),
        stem.position.register_forward_hook(keep("position")),
    ]
    training = stem.training
    stem.eval()
    try:
        stem(images)
    finally:
        stem.train(training)
        for handle in hooks:
            handle.remove()
    return seen["entering"], seen["position"][:, :, 1:].sum(2).flatten(2)


def keep_detector(model: Spikformer, optimizer: torch.optim.Optimizer) -> None:
    """Keep the detector's parameters as they are in the training of a float or quantised model.

    Without a gradient they still decay, so they are put back after every step.
    """
    stem = stem_of(model)
    found = [*stem.conv4.parameters(), *stem.position.parameters()]
    parameters = [parameter for parameter in found if parameter.requires_grad]
    rows = [parameter.detach()[0].clone() for parameter in parameters]  # one for every channel
    for parameter in parameters:
        parameter.register_hook(_without_first)

    def put_back(*_: object) -> None:
        with torch.no_grad():
            for parameter, row in zip(parameters, rows, strict=True):
                parameter[0] = row

    optimizer.register_step_post_hook(put_back)


def _without_first(gradient: Tensor) -> Tensor:
    rest = gradient.clone()
    rest[0] = 0.0
    return rest
