"""Depths and delays of a graph for the Lava processes here (stands in for export.passes.schedule)."""

from __future__ import annotations

from dataclasses import replace

from export.graph import Graph
from export.lava.partition import latency


def schedule(graph: Graph) -> Graph:
    """The graph with a depth for every node and a delay on every edge."""
    depth: dict[str, int] = {}
    for node in graph.nodes:
        before = [depth[e.source] for e in graph.into(node.name)]
        depth[node.name] = max(before, default=0) + latency(node)
    edges = tuple(
        replace(e, delay=depth[e.target] - latency(graph[e.target]) - depth[e.source])
        for e in graph.edges
    )
    return replace(graph, edges=edges, depth=depth)
