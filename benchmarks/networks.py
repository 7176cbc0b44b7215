"""Networks that the benchmarks run: random weights tuned to a density, halted tokens, parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from norse.torch import LIFBoxCell, LIFBoxParameters
from torch import Tensor, nn

from atsnn.config import HaltingConfig, ModelConfig
from atsnn.fixed_point import (
    DECAY_UNITY,
    SCORE_UNITY,
    NeuronConstants,
    NeuronModel,
    pixels_to_integers,
    quantize_readout,
    quantize_synapse,
)
from atsnn.spikformer import Spikformer
from benchmarks.side_by_side import bisected
from export import FoldNorm, Quantize
from export.capture import capture
from export.graph import (
    LIF,
    Conv,
    Edge,
    Gate,
    Graph,
    HaltingScore,
    Input,
    Linear,
    Output,
    Readout,
    Reshape,
)
from export.shapes import shapes
from export.spikformer import compile_spikformer
from export.validation import validate
from hardware.engine import run
from hardware.events import EventCounts

Images = npt.NDArray[np.uint8]

DENSITY = 0.10
TUNING_IMAGES = 4
TOKENS = 64
"""Of the single layer."""
DRIVES = (-2.0, 1.0)
"""Range of the knob: the mean of the normalised input current, whose variance is 1."""


@dataclass(frozen=True)
class Tuned:
    """A random network at a density.

    Attributes:
        model: float, all gates open (`adaptive` is off).
        graph: its quantised graph.
        drive: the knob, one bias of all normalisations.
        density, firing: see `density_of` and `firing_of`, on the tuning images.
    """

    model: Spikformer
    graph: Graph
    drive: float
    density: float
    firing: float

    @property
    def note(self) -> str:
        return (
            f"random weights; the one bias of all batch normalisations is {self.drive:.3f}, tuned "
            f"on {TUNING_IMAGES} images to {self.density:.1%} mean density (SOPs of the "
            "convolutions and linear layers behind spikes over their dense operations; the first "
            "convolution, which takes pixels, is left out); "
            f"{self.firing:.1%} of the neurons fire at a step"
        )


def random_images(config: ModelConfig, count: int) -> Images:
    """Uniform noise, uint8 [count, C, H, W], the same in every run."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, config.in_channels, *config.image_size), dtype=np.uint8)


def tuned_spikformer(
    config: ModelConfig, density: float = DENSITY, tolerance: float | None = None
) -> Tuned:
    """Random weights, normalised on a few images, at the bias that gives a mean density.

    Raises:
        BenchmarkError: no bias in reach gives that density.
    """
    images = random_images(config, TUNING_IMAGES)
    latest: dict[float, tuple[Spikformer, Graph, EventCounts]] = {}

    def found(drive: float) -> float:
        model = random_spikformer(config, images, drive)
        graph = compile_spikformer(model)
        events = events_of(graph, images)
        latest.clear()
        latest[drive] = (model, graph, events)
        return density_of(events)

    close = density / 50 if tolerance is None else tolerance
    drive, _ = bisected(found, *DRIVES, density, close, f"mean density {density:.0%}")
    model, graph, events = latest[drive]
    return Tuned(model, graph, drive, density_of(events), firing_of(graph, events))


def random_spikformer(config: ModelConfig, images: Images, drive: float) -> Spikformer:
    """Seeded weights, normalised on images: every normalised current has mean `drive`, variance 1.

    All gates are open (`adaptive` is off).
    """
    torch.manual_seed(0)
    model = Spikformer(config)
    model.adaptive = False
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.constant_(module.bias, drive)
    with torch.no_grad():
        model.train()(torch.from_numpy(images).float() / 255)
    return model.eval()


def events_of(graph: Graph, images: Images) -> EventCounts:
    """Event counts of a run."""
    events = run(graph, images, record="none").events
    assert events is not None
    return events


def density_of(events: EventCounts) -> float:
    """SOPs over dense operations, of all Conv and Linear nodes but the first, which takes pixels.

    A value that is not 0 is one SOP per synapse, also on the residual stream, where it may stand
    for several spikes; a halted token has none, so this is the density per dense operation.
    """
    layers = [node for node in events.nodes if node.kind in ("Conv", "Linear")][1:]
    dense = sum(node.dense_macs for node in layers) * events.images * events.steps
    return sum(node.sum("sops") for node in layers) / dense


def firing_of(graph: Graph, events: EventCounts) -> float:
    """Mean share of the neurons that fire at a step."""
    sizes = shapes(graph)
    neurons = sum(int(np.prod(sizes[node.name, "out"])) for node in graph.of_kind(LIF))
    fired = sum(events[node.name].sum("spikes") for node in graph.of_kind(LIF))
    return fired / (neurons * events.images * events.steps)


# --- halted tokens ---


def halting_config(config: ModelConfig) -> ModelConfig:
    """The same shape with halting in the default order."""
    return config.model_copy(update={"halting": HaltingConfig(enabled=True)})


def halted(model: Spikformer, share: float, images: Images) -> Graph:
    """The network with gates that process `share` of the tokens of each image set, the dark ones.

    A token halts before the first block and at every step if its patch of 4 x 4 pixels is bright:
    a convolution sums the patch, a neuron without memory fires above the quantile of `images`, and
    its spike closes all gates. So the tokens that are left see the steps and blocks that they see
    without gates; learned scores close gates late, when most operations still lie ahead, and save
    more operations than tokens.

    Args:
        model: made with `halting_config`; the gates' own scores are put aside.
        share: of all token cells, 0 to 1.
        images: uint8 [B, C, H, W], with height and width that are multiples of 4.
    """
    gated = copy.deepcopy(model)
    gated.adaptive = True
    graph = compile_spikformer(gated)
    image = graph.input
    levels = pixels_to_integers(images, image.bits).astype(np.int64)
    *_, height, width = levels.shape
    patches = levels.reshape(-1, image.shape[0], height // 4, 4, width // 4, 4).sum((1, 3, 5))
    threshold = max(1, int(np.quantile(patches, share, method="lower")))
    branch = (
        Conv("halt.sum", "", np.ones((1, image.shape[0], 4, 4), np.int32) * 2, None, (4, 4)),
        LIF("halt.neuron", "", NeuronModel(1.0, 1.0, 1.0), _without_memory(2 * threshold)),
        Reshape("halt.tokens", "", "tokens"),
        HaltingScore("halt.score", "", 1.0, 0.0, np.array([0, SCORE_UNITY], np.int32)),
    )
    names = [image.name, *(node.name for node in branch)]
    edges = [
        *(replace(edge, delay=0) for edge in graph.edges if edge.target_port != "score"),
        *(Edge(a, b) for a, b in pairwise(names)),
        *(Edge("halt.score", gate.name, target_port="score") for gate in graph.of_kind(Gate)),
    ]
    nodes = (image, *branch, *(node for node in graph.nodes if node is not image))
    return _needed(replace(graph, nodes=nodes, edges=tuple(edges), depth={}))


def _without_memory(threshold: int) -> NeuronConstants:
    return NeuronConstants(DECAY_UNITY - 1, DECAY_UNITY, threshold, np.zeros(1, np.int32), 0)


def _needed(graph: Graph) -> Graph:
    """What the output depends on."""
    (output,) = graph.of_kind(Output)
    needed, waiting = {output.name}, [output.name]
    while waiting:
        for edge in graph.into(waiting.pop()):
            if edge.source not in needed:
                needed.add(edge.source)
                waiting.append(edge.source)
    return validate(
        replace(
            graph,
            nodes=tuple(node for node in graph.nodes if node.name in needed),
            edges=tuple(edge for edge in graph.edges if edge.target in needed),
            blocks={name: block for name, block in graph.blocks.items() if name in needed},
        )
    )


def stem_only(graph: Graph) -> Graph:
    """The stem of a Spikformer's graph, read out as the whole network is."""
    (readout,) = graph.of_kind(Readout)
    stem = {node.name for node in graph.nodes if graph.blocks.get(node.name) == "stem"}
    (stream,) = {edge.source for edge in graph.edges if edge.source in stem} & {
        edge.source
        for edge in graph.edges
        if edge.target not in stem and isinstance(graph[edge.target], Linear)
    }
    edges = [
        *(replace(edge, delay=0) for edge in graph.edges if edge.target != readout.name),
        Edge(stream, readout.name, target_port="x"),
    ]
    return _needed(replace(graph, edges=tuple(edges), depth={}))


# --- one linear layer ---


def linear_layer(inputs: int, outputs: int, steps: int) -> Graph:
    """Events [inputs, 8, 8] -> 64 tokens -> Linear -> neurons that never fire -> read-out.

    Silent, so that what follows the layer costs the same whatever enters it; a small bias keeps
    every neuron's membrane moving.
    """
    rng = np.random.default_rng(0)
    neuron = NeuronModel(0.5, 1.0, 1.0)
    weight = rng.normal(0, 1, (outputs, inputs)) / (10 * inputs)
    synapse = quantize_synapse(weight, np.full(outputs, 0.01), neuron, 1, 1.0)
    head, bias, scale = quantize_readout(
        rng.normal(0, 1, (10, outputs)), np.zeros(10), steps * TOKENS
    )
    nodes = (
        Input("image", "", (inputs, 8, 8), bits=1),
        Reshape("tokens", "", "tokens"),
        Linear("linear", "", synapse.weight, None),
        LIF("neuron", "", neuron, synapse.constants, synapse.scale),
        Readout("readout", "", head, bias, scale),
        Output("output", ""),
    )
    names = [node.name for node in nodes]
    ports = {"readout": "x"}
    edges = tuple(Edge(a, b, target_port=ports.get(b, "in")) for a, b in pairwise(names))
    return validate(Graph(nodes, edges, steps, quantized=True))


def random_events(steps: int, count: int, shape: tuple[int, ...], density: float) -> Images:
    """Events uint8 [steps, count, *shape], each there with probability `density`."""
    rng = np.random.default_rng(0)
    return (rng.random((steps, count, *shape), np.float32) < density).astype(np.uint8)


# --- events over a long time ---


class EventNet(nn.Module):
    """One time step of a small convolutional norse network, as its user writes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.lif1 = nn.Conv2d(2, 16, 3, padding=1), _cell()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2, self.lif2 = nn.Conv2d(16, 32, 3, padding=1), _cell()
        self.pool2 = nn.MaxPool2d(2)
        self.fc, self.lif3 = nn.Linear(32 * 8 * 8, 11), _cell()
        with torch.no_grad():
            for layer, gain in ((self.conv1, 10.0), (self.conv2, 6.0), (self.fc, 6.0)):
                layer.weight *= gain

    def forward(self, events: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        s1, s2, s3 = state or (None, None, None)
        x, s1 = self.lif1(self.conv1(events), s1)
        x, s2 = self.lif2(self.conv2(self.pool1(x)), s2)
        x, s3 = self.lif3(self.fc(torch.flatten(self.pool2(x), 1)), s3)
        return x, (s1, s2, s3)

    def counts(self, events: Tensor) -> Tensor:
        """Class spikes [B, 11] over all steps of events [T, B, 2, 32, 32]."""
        state, total = None, torch.zeros(events.shape[1], 11)
        for step in events:
            spikes, state = self(step, state)
            total = total + spikes
        return total


def _cell() -> LIFBoxCell:
    return LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(0.5)), dt=1.0)


def event_graph(net: EventNet, steps: int) -> Graph:
    """The quantised graph of the network."""
    return Quantize(events=True)(
        FoldNorm()(capture(net.eval(), torch.zeros(1, 2, 32, 32), steps, events=True))
    )
