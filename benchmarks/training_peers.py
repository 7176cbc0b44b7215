"""Training peers: the same Spikformer with layers as users of norse and of SpikingJelly write them.

Only layers differ (synapse, batch norm, neurons): the image repeated T times, torch's own
convolution, linear map, batch norm and pooling over all steps flattened into the batch, then the
library's neuron. Parameters keep names and values, so spikes and gradients compare one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from norse.torch import LIFBoxCell, LIFBoxParameters
from torch import Tensor, nn
from torch.nn import functional

from atsnn.layers import ConvLayer, TokenLayer
from atsnn.neurons import SURROGATE, SURROGATE_SLOPE, SpikingNeuron
from atsnn.spikformer import Spikformer
from benchmarks.errors import BenchmarkError
from benchmarks.rivals import import_spikingjelly

OURS, NORSE, JELLY = "ours", "norse eager", "SpikingJelly"

MakeNeuron = Callable[[SpikingNeuron], nn.Module]


class NorseNeuron(nn.Module):
    """norse's `LIFBoxCell`, called step by step: [T, B, ...] -> spikes [T, B, ...]."""

    def __init__(self, neuron: SpikingNeuron) -> None:
        super().__init__()
        rate, threshold = torch.tensor(1.0 / neuron.tau), torch.tensor(neuron.threshold)
        parameters = LIFBoxParameters(
            tau_mem_inv=rate, v_th=threshold, method=SURROGATE, alpha=SURROGATE_SLOPE
        )
        self.cell = LIFBoxCell(parameters, dt=1.0)

    def forward(self, current: Tensor) -> Tensor:
        state, fired = None, []
        for step in current:
            spikes, state = self.cell(step, state)
            fired.append(spikes)
        return torch.stack(fired)


class JellyNeuron(nn.Module):
    """SpikingJelly's `LIFNode` in multi-step mode, torch backend, forgetting between batches.

    It fires at `v >= v_threshold`, ours above it: it is given the next larger threshold, the same
    spikes. Its surrogate `PiecewiseQuadratic(1)` is norse's triangle; the reset is not detached, as
    norse has it.
    """

    def __init__(self, neuron: SpikingNeuron, dtype: torch.dtype) -> None:
        super().__init__()
        self.jelly = import_spikingjelly("functional", "neuron", "surrogate")
        number = np.float64 if dtype == torch.float64 else np.float32
        self.node = self.jelly.neuron.LIFNode(
            tau=float(neuron.tau),
            decay_input=True,
            v_threshold=float(np.nextafter(number(neuron.threshold), number(np.inf))),
            v_reset=0.0,
            surrogate_function=self.jelly.surrogate.PiecewiseQuadratic(alpha=SURROGATE_SLOPE),
            detach_reset=False,
            step_mode="m",
            backend="torch",
        )

    def forward(self, current: Tensor) -> Tensor:
        self.jelly.functional.reset_net(self.node)
        return self.node(current)


class PeerConvLayer(nn.Module):
    """Convolution, batch norm and neurons over [T, B, C, H, W]; an image is repeated first."""

    def __init__(self, layer: ConvLayer, neuron: nn.Module) -> None:
        super().__init__()
        self.synapse, self.norm, self.neuron = layer.synapse, layer.norm, neuron

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        if repeat > x.shape[0]:
            x = x.repeat(repeat, 1, 1, 1, 1)
        current = self.norm(self.synapse(x.flatten(0, 1)))
        return self.neuron(current.unflatten(0, x.shape[:2]))


class PeerTokenLayer(nn.Module):
    """Linear, batch norm and neurons over [T, B, N, I]."""

    def __init__(self, layer: TokenLayer, neuron: nn.Module) -> None:
        super().__init__()
        self.synapse, self.norm, self.neuron = layer.synapse, layer.norm, neuron

    def forward(
        self, x: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, None]:
        current = self.norm(self.synapse(x).flatten(0, 2))
        return self.neuron(current.unflatten(0, x.shape[:3])), None


class PeerNeuron(nn.Module):
    """The neurons behind attention."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(
        self, current: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return self.neuron(current), None


class PeerPool(nn.Module):
    """torch's max pooling with all steps in the batch."""

    def forward(self, spikes: Tensor) -> Tensor:
        pooled = functional.max_pool2d(spikes.flatten(0, 1), 3, 2, 1)
        return pooled.unflatten(0, spikes.shape[:2])


def peer(model: Spikformer, name: str) -> Spikformer:
    """A copy of `model` whose layers are those of a peer; of ours a plain copy.

    Raises:
        BenchmarkError: a model whose tokens halt or merge, or a library that is not installed.
    """
    if model.adaptive:
        raise BenchmarkError("training peers run all tokens; leave halting and merging out")
    result = copy.deepcopy(model)
    if name == OURS:
        return result
    dtype = next(model.parameters()).dtype
    make: MakeNeuron = NorseNeuron if name == NORSE else lambda neuron: JellyNeuron(neuron, dtype)
    stem = result.stem
    for layer in ("conv1", "conv2", "conv3", "conv4", "position"):
        own = getattr(stem, layer)
        setattr(stem, layer, PeerConvLayer(own, make(own.neuron)))
    for pool in ("pool3", "pool4"):
        setattr(stem, pool, PeerPool())
    for block in result.block_list:
        for layer in ("q", "k", "v", "proj", "fc1", "fc2"):
            own = getattr(block, layer)
            norm = nn.BatchNorm1d(own.norm.num_features).to(dtype)
            norm.load_state_dict(own.norm.state_dict())
            replaced = PeerTokenLayer(own, make(own.neuron))
            replaced.norm = norm
            setattr(block, layer, replaced)
        block.attention_neuron = PeerNeuron(make(block.attention_neuron))  # pyright: ignore[reportAttributeAccessIssue] replaced by the peer's
    return result


@contextmanager
def recorded_spikes(model: Spikformer) -> Iterator[dict[str, Tensor]]:
    """Output of every layer of neurons during a forward pass, by the layer's name."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return keep

    kinds = (ConvLayer, TokenLayer, SpikingNeuron, PeerConvLayer, PeerTokenLayer, PeerNeuron)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    layers = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def spikes_and_gradients(
    model: Spikformer, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Spikes of every layer and gradients of every parameter of one step, by name."""
    model.train()
    model.zero_grad(set_to_none=True)
    with recorded_spikes(model) as spikes:
        logits = model(images).logits
    functional.cross_entropy(logits, labels).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return spikes, gradients


def check_same(model: Spikformer, names: Sequence[str], images: Tensor, labels: Tensor) -> str:
    """Ours and the peers fire alike and have the same gradients; says what was compared.

    Compared in float64, where a rounding that differs moves no spike: every spike must be equal
    and every gradient within 1e-6 of its largest entry. Linear biases in front of a batch norm are
    left out: their gradient is 0 but for rounding, and ours computes none.

    Raises:
        BenchmarkError: names the first layer or parameter that differs.
    """
    wide = copy.deepcopy(model).double()
    spikes, gradients = spikes_and_gradients(peer(wide, OURS), images.double(), labels)
    worst = 0.0
    for name in names:
        theirs, their_gradients = spikes_and_gradients(peer(wide, name), images.double(), labels)
        for layer, fired in theirs.items():
            if not torch.equal(fired, spikes[layer]):
                count = int((fired != spikes[layer]).sum())
                raise BenchmarkError(f"{name}: {count:,} spikes of {layer} are not those of ours")
        for parameter, gradient in their_gradients.items():
            scale = float(gradient.abs().max())
            if parameter.endswith("synapse.bias") or not scale:
                continue
            error = float((gradients[parameter] - gradient).abs().max()) / scale
            worst = max(worst, error)
            if error > 1e-6:
                raise BenchmarkError(
                    f"{name}: the gradient of {parameter} differs by {error:.1e} of its largest "
                    "entry, at most 1e-6 is rounding"
                )
    fired = sum(int(s.sum()) for s in spikes.values())
    values = sum(s.numel() for s in spikes.values())
    return (
        f"In float64 all {values:,} spikes of a step ({fired / values:.1%} fire) and all gradients "
        f"are those of {' and '.join(names)}; largest difference of a gradient {worst:.0e} of its "
        "largest entry"
    )
