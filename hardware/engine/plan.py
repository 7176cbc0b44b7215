"""What the engine knows of a graph before it runs: wiring, shapes, ranges, what stands still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from atsnn.fixed_point import SCORE_UNITY
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Graph,
    HaltingScore,
    Hold,
    Input,
    Linear,
    Merge,
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
    Selection,
    Shape,
)
from export.shapes import shapes
from export.validation import validate
from hardware.errors import EngineError

Port = tuple[str, str]

_INT32 = 2**31


@dataclass(frozen=True)
class Interval:
    """Integers that a value can take, both ends included."""

    low: int
    high: int

    @property
    def magnitude(self) -> int:
        return max(-self.low, self.high, 0)


SPIKE = Interval(0, 1)


@dataclass(frozen=True)
class Plan:
    """A checked graph.

    Attributes:
        inputs: (node, input port) -> edges, in order.
        shapes: (node, output port) -> shape without time and batch.
        bounds: (node, output port) -> range of the values; signed, unlike `export.ranges.maxima`.
        static: nodes whose output is the same at every time step.
        once: nodes that run at the first time step only, because a Hold keeps what they bring.
        attention_gates: attention node -> output port of the gate that its q, k and v share.
        units: node -> value of one spike, of one pixel level or of one full halting score in it.
        pixels: nodes whose output is the image as it is, or rearranged.
        multiples: node -> power of two that divides all values of its output.
    """

    graph: Graph
    inputs: dict[Port, tuple[Edge, ...]]
    shapes: dict[Port, Shape]
    bounds: dict[Port, Interval]
    static: frozenset[str]
    once: frozenset[str]
    attention_gates: dict[str, Port]
    units: dict[str, int]
    pixels: frozenset[str]
    multiples: dict[str, int]

    def users(self, node: str) -> list[Edge]:
        """Edges that leave the node."""
        return [edge for edges in self.inputs.values() for edge in edges if edge.source == node]

    def edges(self, node: str, port: str) -> tuple[Edge, ...]:
        return self.inputs.get((node, port), ())

    def shape_into(self, node: str, port: str) -> Shape:
        edge = self.edges(node, port)[0]
        return self.shapes[edge.source, edge.source_port]

    def bound_into(self, node: str, port: str) -> Interval:
        edge = self.edges(node, port)[0]
        return self.bounds[edge.source, edge.source_port]

    @property
    def input_node(self) -> Input:
        return input_of(self.graph)


def input_of(graph: Graph) -> Input:
    """The Input node of a valid graph."""
    for node in graph.of_kind(Input):
        if isinstance(node, Input):
            return node
    raise EngineError("the graph has no Input node")


def image_axis(graph: Graph, images: np.ndarray) -> int:
    """The axis of the images: 0 for pixels [B, ...], 1 for events over time [T, B, ...]."""
    return int(images.ndim == len(input_of(graph).shape) + 2)


def select(images: np.ndarray, axis: int, which: slice | np.ndarray) -> np.ndarray:
    """Some of the images, on whichever axis they lie."""
    return images[:, which] if axis else images[which]


def label(node: Node) -> str:
    """How messages name a node: its kind, its name and the torch module it came from."""
    origin = f" (torch module {node.source})" if node.source else ""
    return f"{node.kind} {node.name}{origin}"


def make_plan(graph: Graph, moving_input: bool = False) -> Plan:
    """Check that the engine can run the graph, and work out what it needs to know.

    Args:
        graph: a quantised graph.
        moving_input: True if the input changes from step to step (events): then nothing is static.

    Raises:
        GraphError: the graph is not valid.
        EngineError: it is valid, but the engine cannot run it; names the node and its torch module.
    """
    if not graph.quantized:
        raise EngineError(
            "the graph is a float graph, the engine runs integers: apply the quantize pass first"
        )
    validate(graph)
    static = frozenset() if moving_input else _static(graph)
    plan = Plan(
        graph=graph,
        inputs=_wiring(graph),
        shapes=shapes(graph),
        bounds={},
        static=static,
        once=graph.once,
        attention_gates={},
        units=_units(graph),
        pixels=_pixels(graph),
        multiples=_multiples(graph),
    )
    for node in graph.nodes:
        _check(plan, node)
        bound = _BOUNDS.get(node.kind, lambda plan, node: SPIKE)(plan, node)
        plan.bounds.update({(node.name, port): bound for port in node.outputs})
        if isinstance(node, Merge):
            tokens = plan.shapes[node.name, "size"][0]
            plan.bounds[node.name, "gate"] = plan.bounds[node.name, "alive"] = SPIKE
            plan.bounds[node.name, "size"] = Interval(0, tokens)
    plan.attention_gates.update(_attention_gates(plan))
    return plan


def _wiring(graph: Graph) -> dict[Port, tuple[Edge, ...]]:
    inputs: dict[Port, tuple[Edge, ...]] = {}
    for edge in graph.edges:
        key = (edge.target, edge.target_port)
        inputs[key] = (*inputs.get(key, ()), edge)
    return inputs


def _static(graph: Graph) -> frozenset[str]:
    """The image stands still, and so does all that is computed from it without state."""
    static: set[str] = set()
    for node in graph.nodes:
        if isinstance(node, Input | Selection) or (
            isinstance(node, Conv | Linear | Reshape | Add | OrPool)
            and all(edge.source in static for edge in graph.into(node.name))
        ):
            static.add(node.name)
    return frozenset(static)


def _units(graph: Graph) -> dict[str, int]:
    units: dict[str, int] = {}
    for node in graph.nodes:
        before = [units[edge.source] for edge in graph.into(node.name) if not edge.lag]
        if isinstance(node, HaltingScore | Selection) or (
            isinstance(node, Add) and SCORE_UNITY in before
        ):
            units[node.name] = SCORE_UNITY
        elif isinstance(node, Reshape | OrPool | Hold):
            units[node.name] = before[0]
        else:
            units[node.name] = 2**graph.fraction_bits if isinstance(node, Add | Merge) else 1
    return units


def _multiples(graph: Graph) -> dict[str, int]:
    multiples: dict[str, int] = {}
    for node in graph.nodes:
        before = [multiples.get(edge.source, 1) for edge in graph.into(node.name)]
        multiples[node.name] = 1
        if isinstance(node, Add):
            multiples[node.name] = min(m << s for m, s in zip(before, node.shifts, strict=True))
        elif isinstance(node, Reshape | OrPool | Hold) or (
            isinstance(node, Merge) and node.combine != "mean"
        ):
            multiples[node.name] = before[0]
    return multiples


def _pixels(graph: Graph) -> frozenset[str]:
    pixels: set[str] = set()
    for node in graph.nodes:
        rearranged = isinstance(node, Reshape) and graph.into(node.name)[0].source in pixels
        if rearranged or (isinstance(node, Input) and node.bits > 1):
            pixels.add(node.name)
    return frozenset(pixels)


def _check(plan: Plan, node: Node) -> None:
    """What a valid graph may hold and the engine may not."""
    if isinstance(node, Attention):
        for port in node.inputs:
            if plan.bound_into(node.name, port) != SPIKE:
                raise EngineError(
                    f"{label(node)}: port {port} takes values up to "
                    f"{plan.bound_into(node.name, port).magnitude}, but attention counts "
                    "coincidences of spikes; put a LIF before it"
                )
    elif isinstance(node, Merge):
        low = plan.bound_into(node.name, "x").low
        if low < 0:
            raise EngineError(
                f"{label(node)}: the stream can be negative (down to {low}), and a merge is "
                "defined for sums of spikes; merge after a LIF"
            )
        if node.assignment == "all" and plan.graph.feedback:
            raise EngineError(
                f"{label(node)}: it assigns from all time steps at once, which a graph whose gates "
                "look back one step cannot do; use assignment 'first'"
            )
    elif isinstance(node, Output):
        source = plan.graph[plan.edges(node.name, "in")[0].source]
        shape = plan.shape_into(node.name, "in")
        if not isinstance(source, Readout | LIF) or len(shape) != 1:
            raise EngineError(
                f"{label(node)}: it takes {source.kind} {source.name} of shape {list(shape)}; "
                "end the network in a Readout or in a LIF layer with one neuron per class"
            )


def _bound_input(_: Plan, node: Input) -> Interval:
    return Interval(0, 2**node.bits - 1)


def _bound_selection(_: Plan, node: Selection) -> Interval:
    return Interval(0, SCORE_UNITY)


def _bound_synapse(plan: Plan, node: Conv | Linear) -> Interval:
    source = plan.bound_into(node.name, "in")
    flat = node.weight.reshape(node.weight.shape[0], -1)
    total = flat.sum(axis=1, dtype=np.int64)
    size = np.abs(flat).sum(axis=1, dtype=np.int64)
    positive, negative = (size + total) // 2, (size - total) // 2
    high = positive * source.high - negative * source.low
    low = positive * source.low - negative * source.high
    bound = Interval(min(int(low.min(initial=0)), 0), max(int(high.max(initial=0)), 0))
    return _in_32_bits(node, bound)


def _bound_add(plan: Plan, node: Add) -> Interval:
    parts = [plan.bounds[e.source, e.source_port] for e in plan.edges(node.name, "in")]
    low = sum(part.low << shift for part, shift in zip(parts, node.shifts, strict=True))
    high = sum(part.high << shift for part, shift in zip(parts, node.shifts, strict=True))
    return _in_32_bits(node, Interval(low, high))


def _in_32_bits(node: Node, bound: Interval) -> Interval:
    if bound.magnitude >= _INT32:
        raise EngineError(
            f"{label(node)}: its sums can reach {bound.magnitude}, beyond the engine's 32 bits; "
            "quantise with fewer fraction bits or smaller weights"
        )
    return bound


def _bound_same(plan: Plan, node: Node) -> Interval:
    source = plan.bound_into(node.name, node.inputs[0])
    return Interval(min(source.low, 0), max(source.high, 0))


def _bound_attention(plan: Plan, node: Attention) -> Interval:
    tokens, channels = plan.shapes[node.name, "out"]
    return Interval(0, tokens * (channels // node.heads))


def _bound_score(_: Plan, node: HaltingScore) -> Interval:
    assert node.table is not None  # a valid quantised graph has one
    return Interval(0, max(int(node.table.max()), SCORE_UNITY))


_BOUNDS: dict[str, Callable[[Plan, Any], Interval]] = {
    "Input": _bound_input,
    "Selection": _bound_selection,
    "Hold": _bound_same,
    "Conv": _bound_synapse,
    "Linear": _bound_synapse,
    "OrPool": _bound_same,
    "Reshape": _bound_same,
    "Add": _bound_add,
    "Attention": _bound_attention,
    "HaltingScore": _bound_score,
    "Merge": _bound_same,
}


def _attention_gates(plan: Plan) -> dict[str, Port]:
    gates: dict[str, Port] = {}
    for node in plan.graph.of_kind(Attention):
        sources = [plan.edges(node.name, port)[0].source for port in node.inputs]
        behind = [plan.edges(source, "gate") for source in sources]
        ports = {(edges[0].source, edges[0].source_port) for edges in behind if edges}
        if all(behind) and len(ports) == 1:
            gates[node.name] = ports.pop()
    return gates


def dense_macs(plan: Plan, node: Node) -> int:
    """MACs of the same node in a dense network, one pass over one image."""
    if isinstance(node, Conv):
        _, height, width = plan.shapes[node.name, "out"]
        return node.weight.size * height * width
    if isinstance(node, Linear):
        return node.weight.size * int(np.prod(plan.shape_into(node.name, "in")[:-1], dtype=int))
    if isinstance(node, Attention):
        tokens, channels = plan.shapes[node.name, "out"]
        return 2 * tokens * tokens * channels
    if isinstance(node, Readout):
        return node.weight.size
    return 0
