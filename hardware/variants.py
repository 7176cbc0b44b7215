"""Graphs that stand beside the adaptive one in a comparison."""

from __future__ import annotations

from dataclasses import replace

from export.graph import Edge, Graph, Merge, Output
from export.validation import validate

_GATING_PORTS = ("gate", "alive", "size", "keys")


def open_all_gates(graph: Graph) -> Graph:
    """The same network with all tokens: every gate open at every step, nothing merged.

    Removes Gate, HaltingScore and Merge nodes with all that only serves them; what read a Merge
    reads its stream instead. Weights, constants and fraction bits stay. Schedule (`depth`, `delay`)
    is cleared, since it belongs to the graph with gates.

    Raises:
        GraphError: the graph is not valid.
    """
    validate(graph)
    merged = {
        node.name: graph.into(node.name, "x")[0] for node in graph.nodes if isinstance(node, Merge)
    }
    edges = [
        _around_merges(edge, merged)
        for edge in graph.edges
        if edge.target_port not in _GATING_PORTS and edge.target not in merged
    ]
    (output,) = (node.name for node in graph.of_kind(Output))
    needed = _upstream(output, edges)
    nodes = tuple(node for node in graph.nodes if node.name in needed)
    return validate(
        replace(
            graph,
            nodes=nodes,
            edges=tuple(edge for edge in edges if edge.target in needed),
            depth={},
            blocks={name: block for name, block in graph.blocks.items() if name in needed},
        )
    )


def _around_merges(edge: Edge, merged: dict[str, Edge]) -> Edge:
    while edge.source in merged:
        before = merged[edge.source]
        edge = replace(edge, source=before.source, source_port=before.source_port)
    return replace(edge, delay=0)


def _upstream(name: str, edges: list[Edge]) -> set[str]:
    needed, waiting = {name}, [name]
    while waiting:
        target = waiting.pop()
        for edge in edges:
            if edge.target == target and edge.source not in needed:
                needed.add(edge.source)
                waiting.append(edge.source)
    return needed
