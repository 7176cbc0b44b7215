"""Graphs that stand beside the adaptive one in a comparison."""

from __future__ import annotations

from dataclasses import replace

from export.graph import Edge, Gate, Graph, Merge, Output
from export.validation import validate

NEVER = 2**40
"""A threshold that no sum of halting scores reaches."""
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


def halt_only(graph: Graph) -> Graph:
    """The same network without merging: its gates work, no token joins another.

    Gates behind a Merge become those before it. The schedule is cleared, as in `open_all_gates`.

    Raises:
        GraphError: the graph is not valid.
    """
    validate(graph)
    instead: dict[tuple[str, str], Edge] = {}
    for node in graph.of_kind(Merge):
        instead[node.name, "out"] = graph.into(node.name, "x")[0]
        instead[node.name, "gate"] = graph.into(node.name, "gate")[0]
    merges = {node.name for node in graph.of_kind(Merge)}
    edges = []
    for edge in graph.edges:
        while (before := instead.get((edge.source, edge.source_port))) is not None:
            edge = replace(edge, source=before.source, source_port=before.source_port)
        if edge.source not in merges and edge.target not in merges:
            edges.append(replace(edge, delay=0))
    return validate(
        replace(
            graph,
            nodes=tuple(node for node in graph.nodes if node.name not in merges),
            edges=tuple(edges),
            depth={},
            blocks={name: block for name, block in graph.blocks.items() if name not in merges},
        )
    )


def merge_only(graph: Graph) -> Graph:
    """The same network without halting: gates close for tokens that were merged away, no others.

    Raises:
        GraphError: the graph is not valid.
    """
    validate(graph)
    return replace(
        graph,
        nodes=tuple(
            replace(node, threshold=NEVER) if isinstance(node, Gate) else node
            for node in graph.nodes
        ),
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
