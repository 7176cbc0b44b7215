"""Validity of a graph: names, order, wiring, shapes, and the limits of a quantised graph.

numpy only. Every violation is a `GraphError` that names the node, its torch module, the
numbers on both sides and what to do. `validate` is cheap (it looks at weights once), so that a pass
calls it before and after (`export.passes.base`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from atsnn.fixed_point import (
    BIAS_EXPONENT_LIMIT,
    BIAS_MANTISSA_LIMIT,
    DECAY_UNITY,
    THRESHOLD_LIMIT,
    WEIGHT_MAX,
    WEIGHT_MIN,
)
from export.errors import GraphError
from export.graph import (
    LIF,
    RESERVED_NAMES,
    Add,
    Attention,
    Conv,
    Gate,
    Graph,
    HaltingScore,
    Input,
    Linear,
    Node,
    Norm,
    OrPool,
    Output,
    Readout,
    Selection,
)
from export.ranges import maxima
from export.shapes import refuse, shapes

MAX_NODES = 100_000
MAX_NAME = 256
MAX_STEPS = 4096
MAX_FRACTION_BITS = 12
READOUT_BIAS_LIMIT = 2**52
"""Logits up to twice this are exact in float64."""

_MANY = {("Add", "in"), ("Gate", "score")}
"""Ports that sum any number of edges; every other port takes exactly one."""


def validate(graph: Graph) -> Graph:
    """Check a graph whole and return it, so that calls can be chained.

    Raises:
        GraphError: naming the first node that is wrong.
    """
    _check_header(graph)
    _check_names(graph)
    _check_wiring(graph)
    _check_order(graph)
    shapes(graph)
    _check_selections(graph)
    for node in graph.nodes:
        (_check_quantized if graph.quantized else _check_float)(graph, node)
    if graph.quantized:
        _check_ranges(graph)
    return graph


def topological(nodes: tuple[Node, ...], graph: Graph) -> tuple[Node, ...]:
    """The given nodes, so ordered that every edge without lag points forward; ties keep the order.

    Raises:
        GraphError: the edges without lag form a loop.
    """
    by_name = {node.name: node for node in nodes}
    waiting = {
        name: {e.source for e in graph.edges if e.target == name and not e.lag} for name in by_name
    }
    ordered: list[Node] = []
    done: set[str] = set()
    while len(ordered) < len(nodes):
        ready = [node for node in nodes if node.name not in done and waiting[node.name] <= done]
        if not ready:
            stuck = next(node for node in nodes if node.name not in done)
            refuse(stuck, "it waits for its own output", "put lag=1 on the edge that looks back")
        ordered += ready
        done |= {node.name for node in ready}
    return tuple(ordered)


# --- names, wiring, order ---


def _check_header(graph: Graph) -> None:
    if not 1 <= graph.steps <= MAX_STEPS:
        raise GraphError(f"steps is {graph.steps}, it must be 1 to {MAX_STEPS}")
    if not 0 <= graph.fraction_bits <= MAX_FRACTION_BITS:
        raise GraphError(
            f"fraction_bits is {graph.fraction_bits}, it must be 0 to {MAX_FRACTION_BITS}"
        )
    if len(graph.nodes) > MAX_NODES:
        raise GraphError(f"{len(graph.nodes)} nodes, at most {MAX_NODES} are allowed")
    for kind in (Input, Output):
        found = sum(isinstance(node, kind) for node in graph.nodes)
        if found != 1:
            raise GraphError(f"{found} {kind.__name__} nodes, a graph has exactly one")


def _check_names(graph: Graph) -> None:
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name or len(node.name) > MAX_NAME or "/" in node.name:
            refuse(
                node, f"its name has {len(node.name)} characters", f"use 1 to {MAX_NAME}, without /"
            )
        if node.name in RESERVED_NAMES:
            refuse(node, f"{node.name} is what results or inputs are called", "rename the layer")
        if node.name in seen:
            refuse(node, "two nodes have this name", "rename one of them")
        seen.add(node.name)
    for table, label in ((graph.depth, "depth"), (graph.blocks, "blocks")):
        for name in table:
            if name not in seen:
                raise GraphError(f"{label} speaks of node {name}, which the graph does not have")


def check_classes(graph: Graph) -> None:
    """Check that a valid graph ends in classes: logits, or one spiking neuron per class.

    Raises:
        GraphError: naming what it ends in.
    """
    output = next(node for node in graph.nodes if isinstance(node, Output))
    (edge,) = graph.into(output.name)
    found = shapes(graph)
    source, shape = graph[edge.source], found[edge.source, edge.source_port]
    if not isinstance(source, Readout | LIF) or len(shape) != 1:
        refuse(
            output,
            f"it takes {source.kind} {source.name} of shape {list(shape)}",
            "end the network in a Readout or in a LIF layer with one neuron per class",
        )


def _check_wiring(graph: Graph) -> None:
    by_name = {node.name: node for node in graph.nodes}
    counts: dict[tuple[str, str], int] = {}
    for edge in graph.edges:
        for name in (edge.source, edge.target):
            if name not in by_name:
                raise GraphError(
                    f"edge {edge.source} -> {edge.target}: the graph has no node {name}"
                )
        source, target = by_name[edge.source], by_name[edge.target]
        if edge.source_port not in source.outputs:
            refuse(
                source,
                f"an edge leaves output port {edge.source_port}",
                f"its ports are {', '.join(source.outputs)}",
            )
        ports = target.inputs + target.optional_inputs
        if edge.target_port not in ports:
            refuse(
                target,
                f"an edge enters input port {edge.target_port}",
                f"its ports are {', '.join(ports) or 'none'}",
            )
        if edge.lag not in (0, 1) or edge.delay < 0:
            refuse(
                target,
                f"the edge from {edge.source} has lag {edge.lag} and delay {edge.delay}",
                "lag is 0 or 1, delay is 0 or more",
            )
        if edge.lag and not isinstance(target, Gate):
            refuse(
                target,
                f"the edge from {edge.source} has lag 1",
                "only a Gate can take a late value",
            )
        key = (edge.target, edge.target_port)
        counts[key] = counts.get(key, 0) + 1
    for node in graph.nodes:
        for port in node.inputs + node.optional_inputs:
            found = counts.get((node.name, port), 0)
            if port in node.inputs and not found:
                refuse(node, f"input port {port} is open", "connect an edge to it")
            if found > 1 and (node.kind, port) not in _MANY:
                refuse(node, f"{found} edges enter input port {port}", "sum them with an Add node")


def _check_order(graph: Graph) -> None:
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    for edge in graph.edges:
        if not edge.lag and place[edge.source] >= place[edge.target]:
            refuse(
                graph[edge.target],
                f"it stands at place {place[edge.target]}, before its input {edge.source} at "
                f"place {place[edge.source]}",
                "sort the nodes with export.validation.topological",
            )


def _check_selections(graph: Graph) -> None:
    for node in graph.of_kind(Selection):
        for edge in graph.out_of(node.name):
            target = graph[edge.target]
            if not isinstance(target, Gate):
                refuse(target, f"it reads {node.name}", "only a Gate can read a Selection")


# --- number systems ---


def _check_float(graph: Graph, node: Node) -> None:
    if isinstance(node, Conv | Linear | Readout):
        for label in ("weight", "bias"):
            array = getattr(node, label)
            if array is not None and not np.isfinite(array).all():
                bad = int(np.count_nonzero(~np.isfinite(array)))
                refuse(
                    node, f"{bad} of {array.size} entries of {label} are not finite", "train again"
                )
    if isinstance(node, Add) and any(node.shifts):
        refuse(node, f"its shifts are {node.shifts}", "a float graph shifts nothing")
    if isinstance(node, LIF) and not node.model.threshold > 0:
        refuse(node, f"its threshold is {node.model.threshold}", "it must be positive")


def _check_quantized(graph: Graph, node: Node) -> None:
    rule = _QUANTIZED.get(node.kind)
    if rule is not None:
        rule(node)


def _quantized_norm(node: Norm) -> None:
    refuse(node, "a quantised graph holds no normalisation", "run the fold_norm pass first")


def _quantized_input(node: Input) -> None:
    if not 1 <= node.bits <= 8:
        refuse(node, f"its pixels have {node.bits} bits", "use 1 to 8")


def _quantized_synapse(node: Conv | Linear) -> None:
    if node.bias is not None:
        refuse(
            node,
            "it holds a bias",
            "the bias belongs to the LIF behind it (quantize puts it there)",
        )
    if node.weight.dtype not in (np.int16, np.int32):
        refuse(node, f"its weight is {node.weight.dtype}", "a quantised graph holds int16 or int32")
    _check_range(node, "weight", node.weight, WEIGHT_MIN, WEIGHT_MAX)
    odd = int(np.count_nonzero(node.weight & 1))
    if odd:
        refuse(
            node,
            f"{odd} of {node.weight.size} weights are odd",
            "a mixed-sign synapse holds even weights only (fixed_point.even_weights)",
        )


def _quantized_lif(node: LIF) -> None:
    constants = node.constants
    if constants is None:
        refuse(node, "it has no integer constants", "run the quantize pass")
    _check_number(node, "du", constants.du, 0, DECAY_UNITY - 1)
    _check_number(node, "dv", constants.dv, 0, DECAY_UNITY)
    _check_number(node, "threshold", constants.threshold, 1, THRESHOLD_LIMIT)
    _check_number(node, "bias exponent", constants.bias_exponent, 0, BIAS_EXPONENT_LIMIT)
    if constants.bias_mantissa.dtype != np.int32:
        refuse(
            node, f"its bias is {constants.bias_mantissa.dtype}", "a quantised graph holds int32"
        )
    _check_range(node, "bias", constants.bias_mantissa, -BIAS_MANTISSA_LIMIT, BIAS_MANTISSA_LIMIT)


def _quantized_attention(node: Attention) -> None:
    if node.scale != 1:
        refuse(
            node, f"its scale is {node.scale}", "it must be 1: the factor sits in the LIF behind it"
        )


def _quantized_score(node: HaltingScore) -> None:
    table = node.table
    if table is None or table.ndim != 1 or table.size < 1 or table.dtype != np.int32:
        refuse(node, "it has no int32 table", "run the quantize pass")
    if (table < 0).any():
        refuse(node, f"its table holds {int(table.min())}", "scores are 0 or more")


def _quantized_gate(node: Gate) -> None:
    if node.threshold != int(node.threshold):
        refuse(
            node, f"its threshold is {node.threshold}", "it must be an integer in units of 1/4096"
        )


def _quantized_readout(node: Readout) -> None:
    for label in ("weight", "bias"):
        array = getattr(node, label)
        if not np.issubdtype(array.dtype, np.integer):
            refuse(node, f"its {label} is {array.dtype}", "a quantised graph holds integers")
    _check_range(node, "weight", node.weight, WEIGHT_MIN, WEIGHT_MAX)
    _check_range(node, "bias", node.bias, -READOUT_BIAS_LIMIT, READOUT_BIAS_LIMIT)


def _check_number(node: Node, label: str, value: int, low: int, high: int) -> None:
    if value != int(value) or not low <= value <= high:
        refuse(node, f"{label} is {value}", f"the core holds integers {low} to {high}")


def _check_range(node: Node, label: str, array: np.ndarray, low: int, high: int) -> None:
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        refuse(
            node,
            f"its {label} reaches from {int(array.min())} to {int(array.max())}",
            f"the core holds {low} to {high}",
        )


_QUANTIZED: dict[str, Callable[..., None]] = {
    "Norm": _quantized_norm,
    "Input": _quantized_input,
    "Conv": _quantized_synapse,
    "Linear": _quantized_synapse,
    "LIF": _quantized_lif,
    "Attention": _quantized_attention,
    "HaltingScore": _quantized_score,
    "Gate": _quantized_gate,
    "Readout": _quantized_readout,
}


def _check_ranges(graph: Graph) -> None:
    largest = maxima(graph)
    for node in graph.nodes:
        if isinstance(node, OrPool):
            (edge,) = graph.into(node.name)
            _quantized_pool(node, largest[edge.source, edge.source_port])
        if isinstance(node, HaltingScore) and node.table is not None:
            (edge,) = graph.into(node.name)
            highest = largest[edge.source, edge.source_port]
            if highest >= node.table.size:
                refuse(
                    node,
                    f"its table has {node.table.size} entries and the stream reaches {highest}",
                    f"give it {highest + 1} entries",
                )


def _quantized_pool(node: OrPool, largest: int) -> None:
    if largest > 1:
        refuse(
            node,
            f"it pools values up to {largest}, it holds spikes only",
            "pool behind a spiking layer; events as input: Quantize(events=True)",
        )
