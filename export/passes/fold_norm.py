"""Fold batch normalisation into the synapse before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from export.graph import Conv, Edge, Graph, Linear, Norm
from export.passes.base import GraphPass
from export.shapes import refuse


@dataclass(frozen=True)
class FoldNorm(GraphPass):
    """Every Norm behind a Conv or Linear becomes part of that synapse's weight and bias.

    Rewrites: `Conv|Linear -> Norm` to one Conv or Linear; the factor is computed in float64 and the
    result has the type of the weight. The values of the graph change by rounding only.

    Refuses: a Norm behind anything else, and one whose synapse is also read before the Norm.
    """

    def rewrite(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if isinstance(node, Norm):
                graph = _fold(graph, node)
        return graph


def _fold(graph: Graph, norm: Norm) -> Graph:
    (edge,) = graph.into(norm.name)
    synapse = graph[edge.source]
    if not isinstance(synapse, Conv | Linear):
        refuse(
            norm,
            f"it stands behind {synapse.kind} {synapse.name}",
            "only a Norm directly behind a Conv or Linear folds: move it there",
        )
    readers = graph.out_of(synapse.name)
    if len(readers) > 1:
        refuse(
            norm,
            f"{synapse.name} is read by {len(readers)} nodes",
            "let the Norm alone read it, or give the other reader a synapse of its own",
        )
    folded = folded_synapse(synapse, norm)
    return replace(
        graph,
        nodes=tuple(folded if n is synapse else n for n in graph.nodes if n is not norm),
        edges=tuple(_rewired(e, norm.name, synapse.name) for e in graph.edges if e is not edge),
        blocks={name: label for name, label in graph.blocks.items() if name != norm.name},
        depth={},
    )


def _rewired(edge: Edge, old: str, new: str) -> Edge:
    return replace(edge, source=new) if edge.source == old else edge


def folded_synapse(synapse: Conv | Linear, norm: Norm) -> Conv | Linear:
    """The synapse with the normalisation behind it folded in."""
    weight = synapse.weight.astype(np.float64)
    bias = np.zeros(len(weight)) if synapse.bias is None else synapse.bias.astype(np.float64)
    factor = norm.weight.astype(np.float64) / np.sqrt(
        norm.variance.astype(np.float64) + norm.epsilon
    )
    folded = weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))
    shifted = (bias - norm.mean.astype(np.float64)) * factor + norm.bias.astype(np.float64)
    return replace(
        synapse,
        weight=folded.astype(synapse.weight.dtype),
        bias=shifted.astype(synapse.weight.dtype),
    )
