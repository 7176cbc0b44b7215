"""When each value exists on pipelined hardware, and how long messages must wait for each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from export.graph import Attention, Conv, Graph, Linear, Node, OrPool
from export.passes.base import GraphPass
from export.shapes import refuse

MAX_DELAY = 62
"""Longest delay of a message on Loihi 2 (lava-dl netx clips there)."""


def latency(node: Node) -> int:
    """Hardware steps from a message that enters a node to the one that leaves it.

    A synapse stage sends what the previous step brought, as Lava's Conv and Dense do; all else
    answers within the step.
    """
    return int(isinstance(node, Conv | Linear | Attention | OrPool))


@dataclass(frozen=True)
class Schedule(GraphPass):
    """Set `depth` of every node and `delay` of every edge, so that rejoining branches meet.

    A node's depth is the hardware step, counted from the image's first, at which its first value
    appears: the largest depth among its inputs plus its own latency. An edge from a shallower node
    waits for the difference. Edges with lag 1 do not count: what looks back cannot be pipelined.

    Refuses: a delay above `max_delay`.
    """

    max_delay: int = MAX_DELAY

    def rewrite(self, graph: Graph) -> Graph:
        depth: dict[str, int] = {}
        for node in graph.nodes:
            before = [depth[e.source] for e in graph.into(node.name) if not e.lag]
            depth[node.name] = max(before, default=0) + latency(node)
        edges = []
        for edge in graph.edges:
            target = graph[edge.target]
            delay = 0 if edge.lag else depth[target.name] - latency(target) - depth[edge.source]
            if delay > self.max_delay:
                refuse(
                    target,
                    f"the message from {edge.source} must wait {delay} steps, at most "
                    f"{self.max_delay} can be held",
                    "shorten the branch beside it, or relay the message through a neuron",
                )
            edges.append(replace(edge, delay=delay))
        return replace(graph, edges=tuple(edges), depth=depth)
