"""Shapes of all values in a graph, and what each kind of node accepts. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from export.errors import GraphError
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Gate,
    Graph,
    HaltingScore,
    Hold,
    Input,
    Linear,
    Merge,
    Node,
    Norm,
    OrPool,
    Output,
    Readout,
    Reshape,
    Selection,
    Shape,
)

MAX_SHIFT = 12
MAX_ELEMENTS = 2**27
"""Most elements of one value; more is a damaged graph rather than a network."""

PortShapes = dict[tuple[str, str], Shape]


def refuse(node: Node, problem: str, mend: str) -> NoReturn:
    """Raise a `GraphError` about a node in the one form that all of them have."""
    origin = f" (torch module {node.source})" if node.source else ""
    raise GraphError(f"{node.kind} {node.name}{origin}: {problem}; {mend}")


@dataclass(frozen=True)
class _Inputs:
    """Shapes that arrive at a node, by port."""

    node: Node
    by_port: dict[str, list[Shape]]

    def __getitem__(self, port: str) -> Shape:
        return self.by_port[port][0]

    def get(self, port: str) -> Shape | None:
        found = self.by_port.get(port)
        return found[0] if found else None

    def expect(self, port: str, shape: Shape) -> None:
        found = self.get(port)
        if found is not None and found != shape:
            refuse(
                self.node,
                f"port {port} receives shape {list(found)}",
                f"it needs {list(shape)}",
            )


def shapes(graph: Graph) -> PortShapes:
    """Shape of every output port, per time step and image, by (node name, port).

    Raises:
        GraphError: a node that cannot take what arrives at it.
    """
    known: PortShapes = {}
    late = []
    for node in graph.nodes:
        arriving: dict[str, list[Shape]] = {}
        for edge in graph.into(node.name):
            if edge.lag:
                late.append((node, edge))
            else:
                shape = known[edge.source, edge.source_port]
                arriving.setdefault(edge.target_port, []).append(shape)
        if isinstance(node, Gate) and "score" not in arriving:
            arriving["score"] = [_late_score(graph, node)]
        for port, shape in output_shapes(node, arriving).items():
            if math.prod(shape) > MAX_ELEMENTS:
                refuse(
                    node,
                    f"its value has shape {list(shape)}",
                    f"at most {MAX_ELEMENTS} elements are allowed: use less padding",
                )
            known[node.name, port] = shape
    for node, edge in late:
        found, wanted = known[edge.source, edge.source_port], known[node.name, "out"]
        if found != wanted:
            refuse(
                node,
                f"the late score of {edge.source} has shape {list(found)}",
                f"it needs {list(wanted)}",
            )
    return known


def output_shapes(node: Node, arriving: dict[str, list[Shape]]) -> dict[str, Shape]:
    """Shape of each output port of one node, from the shapes that arrive at each input port.

    Raises:
        GraphError: the node cannot take them.
    """
    return dict(_RULES[node.kind](node, _Inputs(node, arriving)))


def _late_score(graph: Graph, node: Node) -> Shape:
    """Shape of a gate's score, all of which is late, found upstream of where it comes from."""
    edges = graph.into(node.name, "score")
    return _data_shapes(graph, edges[0].source, {})[edges[0].source_port]


_DATA_PORTS = frozenset({"in", "x", "q", "k", "v", "keys"})


def _data_shapes(graph: Graph, name: str, found: dict[str, dict[str, Shape]]) -> dict[str, Shape]:
    """Output shapes of a node from its data alone, without gates and sizes."""
    if name not in found:
        arriving: dict[str, list[Shape]] = {}
        for edge in graph.into(name):
            if edge.target_port in _DATA_PORTS:
                shape = _data_shapes(graph, edge.source, found)[edge.source_port]
                arriving.setdefault(edge.target_port, []).append(shape)
        found[name] = output_shapes(graph[name], arriving)
    return found[name]


Ports = Iterator[tuple[str, Shape]]


def _input(node: Input, _: _Inputs) -> Ports:
    if len(node.shape) not in (1, 2, 3) or min(node.shape, default=0) < 1:
        refuse(node, f"its shape is {list(node.shape)}", "use [C, H, W], [N, D] or [D], all >= 1")
    yield "out", node.shape


def _selection(node: Selection, _: _Inputs) -> Ports:
    if node.tokens < 1:
        refuse(node, f"it chooses among {node.tokens} tokens", "there must be at least 1")
    yield "out", (node.tokens,)


def _hold(node: Hold, inputs: _Inputs) -> Ports:
    yield "out", inputs["in"]


def _window(
    node: Node,
    size: Shape,
    kernel: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape = (1, 1),
) -> Shape:
    result = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        if min(k, s, d) < 1 or p < 0:
            refuse(
                node,
                f"kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}",
                "kernel, stride and dilation are >= 1, padding >= 0",
            )
        result.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    if min(result) < 1:
        refuse(
            node,
            f"its window {list(kernel)} does not fit into the map {list(size)} with padding "
            f"{list(padding)}",
            "use a smaller kernel or a larger image",
        )
    return tuple(result)


def _map(node: Node, inputs: _Inputs) -> Shape:
    shape = inputs["in"]
    if len(shape) != 3:
        refuse(node, f"it receives shape {list(shape)}", "it needs a feature map [C, H, W]")
    return shape


def _conv(node: Conv, inputs: _Inputs) -> Ports:
    shape = _map(node, inputs)
    if node.weight.ndim != 4 or node.groups < 1 or node.weight.shape[0] % node.groups:
        refuse(
            node,
            f"weight {list(node.weight.shape)} with {node.groups} groups",
            "it needs [O, C/groups, kh, kw] with O divisible by groups",
        )
    wanted = node.weight.shape[1] * node.groups
    if shape[0] != wanted:
        refuse(node, f"it receives {shape[0]} channels", f"its weight takes {wanted}")
    _check_bias(node, node.bias, node.weight.shape[0])
    size = _window(node, shape[1:], node.weight.shape[2:], node.stride, node.padding, node.dilation)
    yield "out", (node.weight.shape[0], *size)


def _linear(node: Linear, inputs: _Inputs) -> Ports:
    shape = inputs["in"]
    if node.weight.ndim != 2 or len(shape) not in (1, 2):
        refuse(
            node,
            f"weight {list(node.weight.shape)} on shape {list(shape)}",
            "it needs weight [O, I] on [I] or [N, I] (put a Reshape before it)",
        )
    if shape[-1] != node.weight.shape[1]:
        refuse(
            node, f"it receives {shape[-1]} features", f"its weight takes {node.weight.shape[1]}"
        )
    _check_bias(node, node.bias, node.weight.shape[0])
    _check_gate(node, inputs, shape)
    yield "out", (*shape[:-1], node.weight.shape[0])


def _check_bias(node: Node, bias: np.ndarray | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        refuse(node, f"its bias has shape {list(bias.shape)}", f"it needs [{channels}]")


def _check_gate(node: Node, inputs: _Inputs, shape: Shape) -> None:
    if inputs.get("gate") is None:
        return
    if len(shape) != 2:
        refuse(node, f"a gate on shape {list(shape)}", "only tokens [N, D] can be gated")
    inputs.expect("gate", shape[:1])


def channels(shape: Shape) -> int:
    """Number of channels of a value: axis 0 of maps [C, H, W], the last axis of [N, D] and [D]."""
    return shape[0] if len(shape) == 3 else shape[-1]


def _norm(node: Norm, inputs: _Inputs) -> Ports:
    shape = inputs["in"]
    for label in ("mean", "variance", "weight", "bias"):
        found = getattr(node, label).shape
        if found != (channels(shape),):
            refuse(node, f"{label} has shape {list(found)}", f"it needs [{channels(shape)}]")
    yield "out", shape


def _lif(node: LIF, inputs: _Inputs) -> Ports:
    shape = inputs["in"]
    _check_gate(node, inputs, shape)
    if node.constants is not None:
        found = node.constants.bias_mantissa.shape
        if found != (channels(shape),):
            refuse(node, f"its bias has shape {list(found)}", f"it needs [{channels(shape)}]")
    yield "out", shape


def _or_pool(node: OrPool, inputs: _Inputs) -> Ports:
    shape = _map(node, inputs)
    yield "out", (shape[0], *_window(node, shape[1:], node.kernel, node.stride, node.padding))


def _reshape(node: Reshape, inputs: _Inputs) -> Ports:
    shape = inputs["in"]
    if node.to == "tokens":
        c, h, w = _map(node, inputs)
        yield "out", (h * w, c)
    elif node.to == "flatten":
        yield "out", (int(np.prod(shape)),)
    else:
        refuse(node, f"it reshapes to {node.to}", "use tokens or flatten")


def _add(node: Add, inputs: _Inputs) -> Ports:
    arriving = inputs.by_port["in"]
    if len(node.shifts) != len(arriving):
        refuse(
            node,
            f"{len(arriving)} edges and {len(node.shifts)} shifts",
            "give one shift for each edge",
        )
    if any(not 0 <= shift <= MAX_SHIFT for shift in node.shifts):
        refuse(node, f"its shifts are {node.shifts}", f"they must be 0 to {MAX_SHIFT}")
    for shape in arriving[1:]:
        if shape != arriving[0]:
            refuse(
                node,
                f"it adds shapes {list(arriving[0])} and {list(shape)}",
                "both branches must have the same shape",
            )
    yield "out", arriving[0]


def _attention(node: Attention, inputs: _Inputs) -> Ports:
    shape = inputs["q"]
    if len(shape) != 2:
        refuse(node, f"q has shape {list(shape)}", "it needs tokens [N, D]")
    inputs.expect("k", shape)
    inputs.expect("v", shape)
    if node.heads < 1 or shape[1] % node.heads:
        refuse(
            node, f"{node.heads} heads for {shape[1]} features", "heads must divide the features"
        )
    yield "out", shape


def _tokens(node: Node, shape: Shape) -> Shape:
    if len(shape) != 2:
        refuse(node, f"it receives shape {list(shape)}", "it needs tokens [N, D]")
    return shape


def _halting_score(node: HaltingScore, inputs: _Inputs) -> Ports:
    yield "out", _tokens(node, inputs["in"])[:1]


def _gate(node: Gate, inputs: _Inputs) -> Ports:
    shape = inputs["score"]
    if len(shape) != 1:
        refuse(node, f"its score has shape {list(shape)}", "it needs one score for each token, [N]")
    for other in inputs.by_port["score"][1:]:
        if other != shape:
            refuse(node, f"it adds scores {list(shape)} and {list(other)}", "both must be [N]")
    inputs.expect("alive", shape)
    yield "out", shape


def _merge(node: Merge, inputs: _Inputs) -> Ports:
    shape = _tokens(node, inputs["x"])
    for port in ("gate", "alive", "size"):
        inputs.expect(port, shape[:1])
    inputs.expect("keys", shape)
    if node.similarity == "keys" and inputs.get("keys") is None:
        refuse(node, "it compares keys and port keys is open", "connect the k spikes to port keys")
    if shape[0] < 2:
        refuse(node, f"it receives {shape[0]} token", "merging needs at least 2")
    if node.count < 0 or not -1.0 <= node.minimum_similarity <= 1.0:
        refuse(
            node,
            f"count {node.count}, minimum similarity {node.minimum_similarity}",
            "count is 0 or more, the similarity -1 to 1",
        )
    yield "out", shape
    for port in ("gate", "alive", "size"):
        yield port, shape[:1]


def _readout(node: Readout, inputs: _Inputs) -> Ports:
    shape = inputs["x"]
    if len(shape) not in (1, 2) or node.weight.ndim != 2 or node.weight.shape[1] != shape[-1]:
        refuse(
            node,
            f"weight {list(node.weight.shape)} on shape {list(shape)}",
            "it needs weight [classes, D] on [N, D] or [D]",
        )
    _check_bias(node, node.bias, node.weight.shape[0])
    if inputs.get("size") is not None:
        _tokens(node, shape)
        inputs.expect("size", shape[:1])
    if not (np.isfinite(node.scale) and node.scale > 0):
        refuse(node, f"its scale is {node.scale}", "it must be a positive number")
    yield "out", (node.weight.shape[0],)


def _output(node: Output, inputs: _Inputs) -> Ports:
    yield "out", inputs["in"]


_RULES: dict[str, Callable[..., Ports]] = {
    "Input": _input,
    "Selection": _selection,
    "Hold": _hold,
    "Conv": _conv,
    "Linear": _linear,
    "Norm": _norm,
    "LIF": _lif,
    "OrPool": _or_pool,
    "Reshape": _reshape,
    "Add": _add,
    "Attention": _attention,
    "HaltingScore": _halting_score,
    "Gate": _gate,
    "Merge": _merge,
    "Readout": _readout,
    "Output": _output,
}
