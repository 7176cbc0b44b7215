"""Peers of the engine: float inference of the same network, all tokens, each at its best batch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from atsnn.neurons import SpikingNeuron, run_steps
from atsnn.quantization import float_twin, quantize_model
from atsnn.spikformer import Spikformer
from benchmarks.errors import BenchmarkError
from benchmarks.rivals import NorseSpikformer, SpikingJellySpikformer
from benchmarks.side_by_side import Clock, fastest

Images = npt.NDArray[np.uint8]
Network = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

BATCHES = (1, 8, 32, 64)
TRIAL_IMAGES = 64
AGREEMENT = 0.99
"""Least share of images that a peer must classify as PyTorch does; rounding may move a spike."""

EAGER = "PyTorch eager"
FUSED = "PyTorch eager, our fused neurons"
COMPILED = "torch.compile"
JELLY = "SpikingJelly"
NORSE = "norse as written"
ALL = (EAGER, FUSED, COMPILED, JELLY, NORSE)


@dataclass(frozen=True)
class Peer:
    """A network and the batch at which it is fastest."""

    name: str
    network: Network
    batch: int

    @property
    def label(self) -> str:
        return f"{self.name}, batch {self.batch}"

    def infer(self, images: Images) -> Tensor:
        """Logits [B, classes] of raw 8-bit images."""
        return infer(self.network, images, self.batch)


def infer(network: Network, images: Images, batch: int) -> Tensor:
    """Logits [B, classes] of raw 8-bit images, `batch` at a time."""
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(images[start : start + batch]).float() / 255)
            for start in range(0, len(images), batch)
        ]
    return torch.cat(parts)


def folded(model: Spikformer) -> Spikformer:
    """The float network with all tokens and its normalisation folded into the synapses."""
    whole = copy.deepcopy(model)
    whole.adaptive = model.config.halting.enabled or model.config.merging.enabled
    twin = float_twin(quantize_model(whole))
    twin.adaptive = False
    for block in twin.block_list:
        block.merging = None
    return twin.eval()


def make_peers(
    model: Spikformer,
    images: Images,
    names: Sequence[str] = ALL,
    clock: Clock = time.perf_counter,
) -> tuple[list[Peer], list[str]]:
    """Peers of a network, each at its best batch, and a line for each that cannot run here.

    Args:
        model: float or quantised; what the engine's graph was captured from.
        images: uint8 [B, C, H, W]; batches are tried on the first of them, and all sizes that a
            run over all of them needs are run once, so that what is timed later is warm.
        names: which, of `ALL`. clock: by which the best batch is found.

    Raises:
        BenchmarkError: a peer classifies otherwise than PyTorch: it is another network.
    """
    twin = folded(model)
    few = images[:TRIAL_IMAGES]
    expected = infer(Logits(twin), few, len(few)).argmax(1)
    peers, absent = [], []
    for name in names:
        try:
            network = _MAKE[name](twin)
            agreement = float((infer(network, few, len(few)).argmax(1) == expected).float().mean())
        except BenchmarkError as error:
            absent.append(f"{name} left out: {error}")
            continue
        if agreement < AGREEMENT:
            raise BenchmarkError(
                f"{name}: the same class as PyTorch on {agreement:.1%} of {len(few)} images, at "
                f"least {AGREEMENT:.0%} are needed; its weights or neurons are not those of the "
                "network"
            )
        peers.append(_at_best_batch(name, network, few, len(images), clock))
    return peers, absent


def _at_best_batch(name: str, network: Network, few: Images, count: int, clock: Clock) -> Peer:
    sizes = [size for size in BATCHES if size <= len(few)]
    best = fastest(sizes, lambda size: infer(network, few, size), clock=clock)
    peer = Peer(name, network, best)
    rest = count % peer.batch
    if rest:
        infer(network, few[:rest], rest)
    return peer


# --- the network as it is, with other neurons ---


class Logits(nn.Module):
    """Only the logits of a Spikformer; a compiled network returns tensors."""

    def __init__(self, model: Spikformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.forward_layers(image)[0]


class StepNeuron(nn.Module):
    """Neurons that run step by step as torch operations: current [T, B, ...] -> spikes."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(
        self, current: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return run_steps(self.step, current, gate, voltage)


def plain_step(neuron: SpikingNeuron) -> Step:
    """norse's step as plain operations; torch.compile cannot trace norse's parameter tuples."""
    rate, threshold = 1.0 / neuron.tau, neuron.threshold

    def step(current: Tensor, voltage: Tensor) -> tuple[Tensor, Tensor]:
        new = voltage + rate * (current - voltage)
        spikes = (new > threshold).to(new.dtype)
        return spikes, new * (1.0 - spikes)

    return step


def with_steps(model: Spikformer, step: Callable[[SpikingNeuron], Step]) -> Spikformer:
    """A copy whose neurons run step by step."""
    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        if isinstance(module, SpikingNeuron):
            parent, _, child = name.rpartition(".")
            setattr(result.get_submodule(parent), child, StepNeuron(step(module)))
    return result


def eager(twin: Spikformer) -> Network:
    """The network as PyTorch runs it, neurons by norse's own step."""
    return Logits(with_steps(twin, lambda neuron: neuron.step)).eval()


def compiled(twin: Spikformer) -> Network:
    """The network compiled by inductor as one graph, once for each batch size.

    Raises:
        BenchmarkError: no C++ compiler, or this torch cannot compile on this Python.
    """
    _check_compiler()
    network = Logits(with_steps(twin, plain_step)).eval()
    return cast("Network", torch.compile(network, fullgraph=True, dynamic=False))


def _check_compiler() -> None:
    try:
        from torch._inductor.codecache import cpp_compiler
    except ImportError:
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler as cpp_compiler
        except ImportError as error:
            raise BenchmarkError(f"torch has no inductor here ({error})") from None
    try:
        cpp_compiler()
    except Exception as error:  # inductor has no common base of its errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BenchmarkError(f"no C++ compiler ({reason}); install g++ or set CXX") from None


_MAKE: dict[str, Callable[[Spikformer], Network]] = {
    EAGER: eager,
    FUSED: Logits,
    COMPILED: compiled,
    JELLY: lambda twin: SpikingJellySpikformer(twin).eval(),
    NORSE: lambda twin: NorseSpikformer(twin).eval(),
}
