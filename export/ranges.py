"""What kind of value every port of a graph carries, and the largest integer it can reach.

Two kinds: a *current* is what a synapse (Conv, Linear, Attention) delivers to a dendrite, a *value*
is what an axon carries (pixels, spikes, the residual stream, scores, gates). numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from atsnn.fixed_point import SCORE_UNITY, activation_bound
from export.graph import (
    Add,
    Attention,
    Conv,
    Graph,
    Linear,
    Merge,
    Norm,
    Reshape,
)
from export.shapes import PortShapes, shapes

Kind = Literal["current", "value"]
Port = tuple[str, str]


def kinds(graph: Graph) -> dict[Port, Kind]:
    """Whether each output port carries a current or a value; a sum is a current if one part is."""
    known: dict[Port, Kind] = {}
    for node in graph.nodes:
        if isinstance(node, Conv | Linear | Norm | Attention):
            kind: Kind = "current"
        elif isinstance(node, Add | Reshape):
            arriving = [known[e.source, e.source_port] for e in graph.into(node.name) if not e.lag]
            kind = "current" if "current" in arriving else "value"
        else:
            kind = "value"
        known.update({(node.name, port): kind for port in node.outputs})
    return known


def maxima(graph: Graph) -> dict[Port, int]:
    """Largest magnitude of every output port of a quantised graph, from its own weights."""
    known: dict[Port, int] = {}
    sizes = shapes(graph)
    for node in graph.nodes:
        arriving = {
            (e.target_port, index): known.get((e.source, e.source_port), 0)
            for index, e in enumerate(graph.into(node.name))
        }
        rule = _MAXIMA.get(node.kind, lambda node, arriving, sizes: 1)
        known[node.name, node.outputs[0]] = rule(node, arriving, sizes)
        if isinstance(node, Merge):
            known[node.name, "gate"] = known[node.name, "alive"] = 1
            known[node.name, "size"] = sizes[node.name, "size"][0]
    return known


Arriving = dict[tuple[str, int], int]


def _largest(arriving: Arriving, port: str = "in") -> int:
    return max((value for (name, _), value in arriving.items() if name == port), default=0)


def _synapse(node: Conv | Linear, arriving: Arriving, _: PortShapes) -> int:
    return activation_bound(node.weight, _largest(arriving))


def _attention(node: Attention, arriving: Arriving, sizes: PortShapes) -> int:
    tokens, features = sizes[node.name, "out"]
    peak = _largest(arriving, "q") * _largest(arriving, "k") * _largest(arriving, "v")
    return tokens * (features // node.heads) * peak


def _add(node: Add, arriving: Arriving, _: PortShapes) -> int:
    return sum(value << shift for value, shift in zip(arriving.values(), node.shifts, strict=True))


_MAXIMA: dict[str, Callable[..., int]] = {
    "Input": lambda node, arriving, sizes: 2**node.bits - 1,
    "Selection": lambda node, arriving, sizes: SCORE_UNITY,
    "Hold": lambda node, arriving, sizes: _largest(arriving),
    "Conv": _synapse,
    "Linear": _synapse,
    "OrPool": lambda node, arriving, sizes: _largest(arriving),
    "Reshape": lambda node, arriving, sizes: _largest(arriving),
    "Output": lambda node, arriving, sizes: _largest(arriving),
    "Add": _add,
    "Attention": _attention,
    "HaltingScore": lambda node, arriving, sizes: int(node.table.max()),
    "Merge": lambda node, arriving, sizes: _largest(arriving, "x"),
}
