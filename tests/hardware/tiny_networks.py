"""Quantised graphs small enough to check by hand, built without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from atsnn.fixed_point import NeuronConstants, NeuronModel, halting_table, halting_threshold
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Gate,
    Graph,
    HaltingScore,
    Input,
    Linear,
    Merge,
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
)

Order = Literal["upstream", "blocks", "rectangle"]
MODEL = NeuronModel(membrane_rate=0.5, current_rate=1.0, threshold=1.0)


@dataclass
class Sketch:
    """Collects nodes and edges; `node` returns the name, so that calls nest."""

    seed: int = 0
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def node(self, node: Node, **inputs: Any) -> str:
        """Add a node; inputs are "name", "name:port" or lists of them; `in_` is the port `in`."""
        self.nodes.append(node)
        for port, sources in inputs.items():
            for source in sources if isinstance(sources, list) else [sources]:
                if source is not None:
                    name, _, out = source.partition(":")
                    self.edges.append(Edge(name, node.name, out or "out", port.rstrip("_")))
        return node.name

    def weights(self, *shape: int, largest: int = 60) -> np.ndarray:
        """Even int32 weights."""
        return 2 * self.rng.integers(-largest // 2, largest // 2 + 1, shape, dtype=np.int32)

    def lif(
        self,
        name: str,
        source: str,
        threshold: int,
        channels: int,
        gate: str | None = None,
        du: int = 4095,
        dv: int = 2048,
        bias: int = 500,
    ) -> str:
        mantissa = self.rng.integers(-bias, bias + 1, channels, dtype=np.int32)
        constants = NeuronConstants(du, dv, threshold, mantissa, 0)
        return self.node(LIF(name, f"net.{name}", MODEL, constants), in_=source, gate=gate)

    def graph(self, steps: int, fraction_bits: int = 0, **options: Any) -> Graph:
        return Graph(tuple(self.nodes), tuple(self.edges), steps, True, fraction_bits, **options)


def conv_network(
    seed: int = 0, steps: int = 3, bits: int = 4, du: int = 4095, dv: int = 2048
) -> Graph:
    """Two convolutions (strided, padded, grouped), a pool, a dense layer, spikes at the end."""
    s = Sketch(seed)
    image = s.node(Input("image", "", (2, 7, 6), bits))
    s.node(Conv("conv1", "net.conv1", s.weights(4, 2, 3, 3), None, (1, 2), (1, 1)), in_=image)
    s.lif("lif1", "conv1", 40 << bits, 4, du=du, dv=dv)
    s.node(OrPool("pool", "net.pool", (3, 3), (2, 2), (1, 1)), in_="lif1")
    s.node(
        Conv("conv2", "net.conv2", s.weights(6, 2, 2, 2), None, (1, 1), (1, 0), (2, 1), 2),
        in_="pool",
    )
    s.lif("lif2", "conv2", 60, 6, du=du, dv=dv)
    s.node(Reshape("flat", "", "flatten"), in_="lif2")
    size = 6 * 4 * 1
    s.node(Linear("dense", "net.dense", s.weights(5, size), None), in_="flat")
    s.lif("classes", "dense", 40, 5, du=du, dv=dv)
    s.node(Output("output", ""), in_="classes")
    return s.graph(steps)


@dataclass(frozen=True)
class Adaptive:
    """A tiny adaptive spiking transformer on 4 x 4 tokens."""

    seed: int = 0
    steps: int = 3
    blocks: int = 2
    channels: int = 8
    heads: int = 2
    order: Order = "upstream"
    gates: bool = True
    merge: int = 0
    minimum_similarity: float = 0.0
    combine: Literal["mean", "max", "keep"] = "mean"
    similarity: Literal["stream", "keys"] = "stream"
    assignment: Literal["first", "all"] = "first"
    fraction_bits: int = 0
    gates_know_merges: bool = True
    """False: a gate does not learn which tokens were merged away before it; only the merge does."""

    def build(self) -> Graph:
        s, d, f = Sketch(self.seed), self.channels, self.fraction_bits
        labels: dict[str, str] = {}
        s.node(Input("image", "", (2, 4, 4), 4))
        s.node(
            Conv("stem.conv", "net.stem.conv", s.weights(d, 2, 3, 3), None, (1, 1), (1, 1)),
            in_="image",
        )
        s.lif("stem.lif", "stem.conv", 900, d)
        s.node(Reshape("stem.tokens", "", "tokens"), in_="stem.lif")
        stream = s.node(Add("stem.stream", "", (f,)), in_="stem.tokens")
        scores = [self._score(s, "stem.score", stream, 1)] if self.gates else []
        alive = size = None
        for l in range(1, self.blocks + 1):
            b = f"block{l}"
            first = len(s.nodes)
            gate = self._gate(s, b, scores, alive)
            for part in ("q", "k", "v"):
                s.node(
                    Linear(f"{b}.{part}", f"net.{b}.{part}", s.weights(d, d), None),
                    in_=stream,
                    gate=gate,
                )
                s.lif(f"{b}.{part}_lif", f"{b}.{part}", 60 << f, d, gate)
            s.node(
                Attention(f"{b}.attention", f"net.{b}", self.heads, 1.0),
                q=f"{b}.q_lif", k=f"{b}.k_lif", v=f"{b}.v_lif",
            )  # fmt: skip
            s.lif(f"{b}.attention_lif", f"{b}.attention", 6, d, gate, bias=0)
            s.node(
                Linear(f"{b}.proj", f"net.{b}.proj", s.weights(d, d), None),
                in_=f"{b}.attention_lif",
                gate=gate,
            )
            s.lif(f"{b}.proj_lif", f"{b}.proj", 60, d, gate)
            stream = s.node(Add(f"{b}.after_attention", "", (0, f)), in_=[stream, f"{b}.proj_lif"])
            if self.merge or self.minimum_similarity:
                m = s.node(
                    Merge(
                        f"{b}.merge", f"net.{b}.merge", self.merge, self.minimum_similarity,
                        self.combine, self.similarity, self.assignment,
                    ),
                    x=stream, gate=gate, alive=alive, size=size, keys=f"{b}.k_lif",
                )  # fmt: skip
                stream, gate, alive, size = m, f"{m}:gate", f"{m}:alive", f"{m}:size"
            s.node(
                Linear(f"{b}.fc1", f"net.{b}.fc1", s.weights(2 * d, d), None), in_=stream, gate=gate
            )
            s.lif(f"{b}.fc1_lif", f"{b}.fc1", 60 << f, 2 * d, gate)
            s.node(
                Linear(f"{b}.fc2", f"net.{b}.fc2", s.weights(d, 2 * d), None),
                in_=f"{b}.fc1_lif",
                gate=gate,
            )
            s.lif(f"{b}.fc2_lif", f"{b}.fc2", 60, d, gate)
            stream = s.node(Add(f"{b}.out", "", (0, f)), in_=[stream, f"{b}.fc2_lif"])
            if self.gates and (l < self.blocks or self.order == "rectangle"):
                self._next_score(s, b, l, stream, scores)
            labels |= {node.name: b for node in s.nodes[first:]}
        s.node(Readout("head", "net.head", s.weights(3, d), s.weights(3), 7.0), x=stream, size=size)
        s.node(Output("output", ""), in_="head")
        labels |= {node.name: "stem" for node in s.nodes if node.name.startswith("stem")}
        return s.graph(self.steps, f, blocks=labels)

    def _score(self, s: Sketch, name: str, stream: str, levels: int) -> str:
        entries = (levels << self.fraction_bits) + 1
        table = halting_table(1.5, -1.5, entries, self.fraction_bits)
        return s.node(HaltingScore(name, "net.halting", 1.5, -1.5, table), in_=stream)

    def _next_score(self, s: Sketch, b: str, l: int, stream: str, scores: list[str]) -> None:
        name = self._score(s, f"{b}.score", stream, 1 + 2 * l)
        if self.order == "rectangle":
            s.edges.append(Edge(name, f"{b}.gate", "out", "score", lag=1))
        if l < self.blocks:
            scores.append(s.node(Add(f"{b}.scores", "", (0, 0)), in_=[scores[-1], name]))

    def _gate(self, s: Sketch, b: str, scores: list[str], alive: str | None) -> str | None:
        if not self.gates:
            return None
        threshold = halting_threshold(0.01)
        return s.node(
            Gate(f"{b}.gate", "net.halting", threshold, self.order != "blocks"),
            score=scores[-1], alive=alive if self.gates_know_merges else None,
        )  # fmt: skip


def images_for(graph: Graph, count: int, seed: int = 0) -> np.ndarray:
    """Random uint8 images of the size that the graph takes."""
    shape = next(iter(graph.of_kind(Input))).shape  # pyright: ignore[reportAttributeAccessIssue]
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
