"""Parts of a scheduled graph (stem, blocks, head) and the values that pass between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from export.errors import UnsupportedTargetError
from export.graph import (
    LIF,
    Add,
    Edge,
    Gate,
    Graph,
    Hold,
    Input,
    Merge,
    Node,
    OrPool,
    Output,
    Selection,
    Shape,
)
from export.shapes import shapes

Port = tuple[str, str]

WHOLE = "network"
"""Label of the only part of a graph without labels."""
TRACED_KINDS = (LIF, OrPool, Gate)
"""Nodes whose spikes (0 or 1) a run records."""
MAX_PORTS = 16


@dataclass(frozen=True, eq=False)
class Part:
    """The nodes of one block label, with what enters and what leaves.

    Attributes:
        label: block label.
        graph: the whole graph, scheduled.
        nodes: nodes of this part in topological order, without Input and Output.
        sources: values of other parts that this part reads; entry i arrives at port `in<i>`.
        sinks: values of this part that others read; entry i leaves by port `out<i>`.
        shapes: graph shape of every output port of the graph.
    """

    label: str
    graph: Graph
    nodes: tuple[Node, ...]
    sources: tuple[Port, ...]
    sinks: tuple[Port, ...]
    shapes: dict[Port, Shape]


def partition(graph: Graph) -> tuple[Part, ...]:
    """Split a scheduled graph by its block labels; a part comes behind those that it reads from.

    Raises:
        UnsupportedTargetError: a part has too many ports, or parts read one another in a circle.
    """
    labels = _labels(graph)
    sizes = shapes(graph)
    parts = []
    for label in dict.fromkeys(labels.values()):
        inside = {name for name, found in labels.items() if found == label}
        entering = [e for e in graph.edges if e.target in inside and e.source not in inside]
        leaving = [
            e
            for e in graph.edges
            if e.source in inside and e.target not in inside and e.target in labels
        ]
        part = Part(
            label=label,
            graph=graph,
            nodes=tuple(node for node in graph.nodes if node.name in inside),
            sources=_ports(entering),
            sinks=_ports(leaving),
            shapes=sizes,
        )
        for side, ports in (("in", part.sources), ("out", part.sinks)):
            if len(ports) > MAX_PORTS:
                raise UnsupportedTargetError(
                    f"block {label}: {len(ports)} {side}-ports exceed the maximum ({MAX_PORTS}); "
                    "label fewer, larger blocks"
                )
        parts.append(part)
    return _ordered(parts, labels)


def _ports(edges: list[Edge]) -> tuple[Port, ...]:
    return tuple(dict.fromkeys((e.source, e.source_port) for e in edges))


def _labels(graph: Graph) -> dict[str, str]:
    """Label of every node that runs as part of a block; one without follows its first input."""
    labels: dict[str, str] = {}
    first = next(iter(graph.blocks.values()), WHOLE)
    for node in graph.nodes:
        if isinstance(node, Input | Output):
            continue
        before = [labels[e.source] for e in graph.into(node.name) if e.source in labels]
        inherited = before[0] if before else first
        labels[node.name] = graph.blocks.get(node.name, inherited)
    return labels


def _ordered(parts: list[Part], labels: dict[str, str]) -> tuple[Part, ...]:
    """The parts, each behind those that it reads from; otherwise in the order given."""
    waiting = {
        part.label: {labels[name] for name, _ in part.sources if name in labels} for part in parts
    }
    ordered: list[str] = []
    while waiting:
        ready = [label for label, sources in waiting.items() if not sources & waiting.keys()]
        if not ready:
            raise UnsupportedTargetError(
                f"blocks {', '.join(waiting)} read one another in a circle; "
                "label the nodes so that values flow from block to block in one direction"
            )
        ordered.append(ready[0])
        del waiting[ready[0]]
    return tuple(sorted(parts, key=lambda part: ordered.index(part.label)))


def output_source(graph: Graph) -> str:
    """Name of the node whose values are the network's result."""
    output = next(graph.of_kind(Output))
    return graph.into(output.name)[0].source


def probed(graph: Graph) -> Iterator[Node]:
    """Nodes whose values a run records, in topological order: all that spikes, and the result."""
    result = output_source(graph)
    return (n for n in graph.nodes if isinstance(n, TRACED_KINDS) or n.name == result)


def check_supported(graph: Graph) -> None:
    """Refuse what a pipelined network cannot hold.

    Raises:
        UnsupportedTargetError: names the node, says why and what to use instead.
    """
    if not graph.quantized:
        raise UnsupportedTargetError(
            "the graph is in floating point, a Lava network here is fixed point: "
            "run the quantize pass first"
        )
    for node in graph.of_kind(Selection):
        raise UnsupportedTargetError(
            f"{node.name} ({node.source}) chooses tokens outside of the network, which no "
            "chip here does: run this graph in the engine or in torch"
        )
    for node in graph.of_kind(Hold):
        raise UnsupportedTargetError(
            f"{node.name} ({node.source}) holds the first step's value, for which there is no Lava "
            "process here: run this graph in the engine or in torch, or train without stem_once"
        )
    for edge in graph.edges:
        if edge.lag:
            raise UnsupportedTargetError(
                f"gate {edge.target} looks back at {edge.source} from an earlier time step: a "
                "pipelined chip has not yet computed it; use halting order upstream or blocks, "
                "or run this graph in the engine or in torch"
            )
    for node in graph.of_kind(Add):
        terms = len(graph.into(node.name))
        if terms > MAX_PORTS:
            raise UnsupportedTargetError(
                f"add {node.name}: {terms} edges exceed the maximum ({MAX_PORTS}); "
                "add up some of them in an Add of their own"
            )
    for node in graph.of_kind(Merge):
        if isinstance(node, Merge) and node.assignment == "all":
            raise UnsupportedTargetError(
                f"merge {node.name} assigns tokens from all time steps, which a chip cannot know "
                "at the first; use assignment first, or run this graph in the engine or in torch"
            )
