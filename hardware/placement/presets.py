"""Graphs of the published Spikformer shapes, without weights: enough to place them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from atsnn.fixed_point import NeuronModel
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Graph,
    Input,
    Linear,
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
)
from export.passes import Schedule
from hardware.errors import PlacementError

HEADS = {(4, 256): 8, (2, 384): 12, (4, 384): 12, (8, 384): 12, (8, 512): 8, (8, 768): 12}
"""(blocks, width) -> heads, as published."""
_NAME = re.compile(r"spikformer-(\d+)-(\d+)(?:@(\d+))?")
_MODEL = NeuronModel(membrane_rate=0.5, current_rate=1.0, threshold=1.0)


def preset_names() -> tuple[str, ...]:
    """The published shapes; `@SIZE` behind a name sets the size of the image (32 by default)."""
    return tuple(f"spikformer-{blocks}-{dim}" for blocks, dim in HEADS)


def preset_graph(name: str) -> Graph:
    """Shape of a Spikformer by name, for example "spikformer-8-768@224": no weights, scheduled.

    Raises:
        PlacementError: no such name.
    """
    match = _NAME.fullmatch(name)
    shape = (int(match[1]), int(match[2])) if match else (0, 0)
    if match is None or shape not in HEADS:
        raise PlacementError(
            f"no shape named '{name}'; there are {', '.join(preset_names())}, and `@224` behind a "
            "name sets the size of the image"
        )
    size = int(match[3] or 32)
    if not 4 <= size <= 512:
        raise PlacementError(f"preset '{name}': an image of {size} pixels; 4 to 512 can be placed")
    return spikformer_shape(shape[0], shape[1], HEADS[shape], size)


def spikformer_shape(
    blocks: int,
    dim: int,
    heads: int,
    size: int = 32,
    *,
    channels: int = 3,
    classes: int = 10,
    steps: int = 4,
    mlp_ratio: int = 4,
) -> Graph:
    """A Spikformer with all tokens, as `export.compile_spikformer` would name and wire it.

    Args:
        size: height and width of the image in pixels; two pools leave a quarter of each as tokens.
    """
    sketch = _Sketch()
    stream = _stem(sketch, dim, channels, size)
    for index in range(blocks):
        stream = _block(sketch, f"blocks.{index}", stream, dim, heads, mlp_ratio)
    sketch.add(Readout("readout", "readout", _zeros(classes, dim), _zeros(classes)), x=stream)
    sketch.add(Output("output", ""), in_="readout")
    return Schedule()(Graph(tuple(sketch.nodes), tuple(sketch.edges), steps))


@dataclass
class _Sketch:
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def add(self, node: Node, **inputs: str | tuple[str, ...]) -> str:
        self.nodes.append(node)
        for port, sources in inputs.items():
            for source in (sources,) if isinstance(sources, str) else sources:
                self.edges.append(Edge(source, node.name, target_port=port.rstrip("_")))
        return node.name

    def conv(self, name: str, source: str, outputs: int, inputs: int) -> str:
        weight = _zeros(outputs, inputs, 3, 3)
        synapse = f"{name}.synapse"
        self.add(Conv(synapse, synapse, weight, None, (1, 1), (1, 1)), in_=source)
        return self.add(LIF(f"{name}.neuron", f"{name}.neuron", _MODEL), in_=synapse)

    def linear(self, name: str, source: str, outputs: int, inputs: int) -> str:
        synapse = f"{name}.synapse"
        self.add(Linear(synapse, synapse, _zeros(outputs, inputs), None), in_=source)
        return self.add(LIF(f"{name}.neuron", f"{name}.neuron", _MODEL), in_=synapse)


def _zeros(*shape: int) -> np.ndarray:
    """Weights that take no memory."""
    return np.broadcast_to(np.float32(0), shape)


def _stem(sketch: _Sketch, dim: int, channels: int, size: int) -> str:
    value = sketch.add(Input("image", "", (channels, size, size)))
    widths = (channels, dim // 8, dim // 4, dim // 2, dim)
    for index in range(1, 5):
        value = sketch.conv(f"stem.conv{index}", value, widths[index], widths[index - 1])
        if index >= 3:
            pool = f"stem.pool{index}"
            value = sketch.add(OrPool(pool, pool, (3, 3), (2, 2), (1, 1)), in_=value)
    tokens = sketch.add(Reshape("stem.to_tokens", "", "tokens"), in_=value)
    position = sketch.conv("stem.position", value, dim, dim)
    moved = sketch.add(Reshape("stem.position_to_tokens", "", "tokens"), in_=position)
    return sketch.add(Add("stem.add", "stem", (0, 0)), in_=(tokens, moved))


def _block(sketch: _Sketch, name: str, stream: str, dim: int, heads: int, mlp_ratio: int) -> str:
    q, k, v = (sketch.linear(f"{name}.{part}", stream, dim, dim) for part in ("q", "k", "v"))
    attention = sketch.add(Attention(f"{name}.attention", name, heads, 1.0), q=q, k=k, v=v)
    neuron = f"{name}.attention_neuron"
    sketch.add(LIF(neuron, neuron, _MODEL), in_=attention)
    proj = sketch.linear(f"{name}.proj", neuron, dim, dim)
    stream = sketch.add(Add(f"{name}.add_attention", name, (0, 0)), in_=(proj, stream))
    hidden = sketch.linear(f"{name}.fc1", stream, mlp_ratio * dim, dim)
    mlp = sketch.linear(f"{name}.fc2", hidden, dim, mlp_ratio * dim)
    return sketch.add(Add(f"{name}.add_mlp", name, (0, 0)), in_=(mlp, stream))
