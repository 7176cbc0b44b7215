"""A graph as layers of neurons and the paths of synapses between them: what cores have to hold.

A *layer* is a group of neurons that are split over cores together. Its value is a grid of positions
(pixels or tokens) and channels: maps [C, H, W] have H * W positions, tokens [N, D] have N, a flat
vector [D] has one. A `Conv` or `Linear` whose only reader is a LIF is the synapses of that layer;
any other is a layer of its own, whose neurons hold its sums. A `Readout` is two layers: the sums
over tokens and steps, and the classes. The image is sent from outside the cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import scipy.sparse as sp

from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Gate,
    Graph,
    HaltingScore,
    Hold,
    Input,
    Linear,
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
    Selection,
    Shape,
)
from export.shapes import shapes
from hardware.errors import PlacementError

CONTROL_PORTS = ("gate", "alive", "size")
SUMS = ":sums"
"""Suffix of the layer that sums a Readout's tokens."""
BYTE = 8

PathKind = Literal["conv", "linear", "same", "pool", "query", "table", "sum", "score", "control"]


@dataclass(frozen=True)
class Grid:
    """Positions and channels of a value; `maps`: laid out [C, H, W] rather than [N, D]."""

    positions: int
    channels: int
    maps: bool = False
    size: tuple[int, int] = (1, 1)

    @property
    def neurons(self) -> int:
        return self.positions * self.channels


@dataclass(frozen=True, eq=False)
class Path:
    """All synapses from one value to one layer.

    Attributes:
        source, port: node that sends, and its output port. target: layer that receives.
        node: node of the graph that the messages are counted at.
        kind: how positions and channels meet. "conv", "linear": weighted. "same": each value goes
            to its like. "pool": a window. "query": each token to its own, all channels of a head.
            "table": all tokens, all channels of a head. "sum": all positions into each channel.
            "score": channel 0 of each token. "control": one value per token, sent when it changes.
        flatten: the source's maps are read as one flat vector.
        delay: hardware steps that its messages wait. lag: steps of the image that they are late.
        gate: what a closed token would send is not sent.
        synapse: the Conv, Linear or OrPool, if there is one.
        heads: of an attention.
    """

    source: str
    port: str
    target: str
    node: str
    kind: PathKind
    grid: Grid
    flatten: bool = False
    delay: int = 0
    lag: int = 0
    gate: tuple[str, str] | None = None
    synapse: Conv | Linear | OrPool | Readout | None = None
    heads: int = 1

    @property
    def trace(self) -> str:
        """Name of what is sent in the engine's trace."""
        return trace_name(self.source, self.port)


@dataclass(frozen=True, eq=False)
class Layer:
    """Neurons that are split over cores together.

    Attributes:
        name: of the node whose neurons these are (`SUMS` appended for the sums of a Readout).
        kind: of that node.
        source: the torch module. block: label of the graph.
        grid: positions and channels.
        paths: what arrives.
        gate: output port of the gate that switches its tokens off.
        weight_bits: bits of a stored weight. depth: hardware steps after the image's first.
        table_bits: bits of an entry of an attention's table, 0 elsewhere.
        lookup: entries of the look-up table of a HaltingScore, 0 elsewhere.
        heads: of an attention.
    """

    name: str
    kind: str
    source: str
    block: str
    grid: Grid
    paths: tuple[Path, ...]
    gate: tuple[str, str] | None = None
    weight_bits: int = BYTE
    depth: int = 0
    table_bits: int = 0
    lookup: int = 0
    heads: int = 1

    @property
    def node(self) -> str:
        """The node of the graph."""
        return self.name.removesuffix(SUMS)

    @property
    def label(self) -> str:
        """How messages name it: kind, name and torch module."""
        origin = f" (torch module {self.source})" if self.source else ""
        return f"{self.kind} {self.name}{origin}"

    @property
    def data_paths(self) -> tuple[Path, ...]:
        return tuple(path for path in self.paths if path.kind != "control")


@dataclass(frozen=True, eq=False)
class Network:
    """A graph's layers in topological order, and who reads what.

    Attributes:
        layers: by name.
        readers: node -> paths that it feeds.
        image: name of the Input node. image_grid: its positions and channels.
    """

    graph: Graph
    layers: dict[str, Layer]
    image: str
    image_grid: Grid
    readers: dict[str, tuple[Path, ...]] = field(default_factory=dict)


RELAYS = ("Add", "Attention", "Merge")
"""Layers whose neurons pass values on: each value that is not 0 is one firing on a chip."""


def trace_name(node: str, port: str) -> str:
    """Name of an output port in the engine's trace."""
    return node if port == "out" else f"{node}:{port}"


def network_of(graph: Graph) -> Network:
    """Layers and paths of a graph.

    Raises:
        GraphError: shapes that do not fit.
    """
    builder = _Builder(graph)
    layers = {layer.name: layer for layer in builder.layers()}
    readers: dict[str, list[Path]] = {}
    for layer in layers.values():
        for path in layer.paths:
            readers.setdefault(path.source, []).append(path)
    image = graph.input.name
    return Network(
        graph, layers, image, builder.grid(image), {k: tuple(v) for k, v in readers.items()}
    )


class _Builder:
    def __init__(self, graph: Graph) -> None:
        for node in graph.of_kind(Selection, Hold):
            raise PlacementError(
                f"{node.kind} {node.name} (torch module {node.source}) has no form on a core: "
                "place a network without selection and without stem_once"
            )
        self.graph = graph
        self.shapes = shapes(graph)
        self.into: dict[str, list[Edge]] = {}
        self.out_of: dict[str, list[Edge]] = {}
        for edge in graph.edges:
            self.into.setdefault(edge.target, []).append(edge)
            self.out_of.setdefault(edge.source, []).append(edge)
        self.nodes = {node.name: node for node in graph.nodes}
        self.per_token = self._per_token()
        self.fused = self._fused()

    def _per_token(self) -> set[str]:
        """Nodes whose value [N] is one number per token, not a flat vector."""
        found: set[str] = set()
        for node in self.graph.nodes:
            scalar = isinstance(node, HaltingScore | Gate)
            behind = [e.source in found for e in self.into.get(node.name, ())]
            if scalar or (isinstance(node, Add) and any(behind)):
                found.add(node.name)
        return found

    def _fused(self) -> dict[str, str]:
        """Conv or Linear -> the LIF that it is the synapses of."""
        fused: dict[str, str] = {}
        for node in self.graph.of_kind(Conv, Linear):
            edges = self.out_of.get(node.name, [])
            while len(edges) == 1 and self._is_tokens(edges[0].target):
                edges = self.out_of.get(edges[0].target, [])
            if len(edges) == 1 and isinstance(self.nodes[edges[0].target], LIF):
                fused[node.name] = edges[0].target
        return fused

    def _is_tokens(self, name: str) -> bool:
        node = self.nodes[name]
        return isinstance(node, Reshape) and node.to == "tokens"

    def grid(self, name: str, port: str = "out") -> Grid:
        shape = self.shapes[name, port]
        if port != "out" or name in self.per_token:
            return Grid(shape[0], 1)
        return grid_of(shape)

    def layers(self) -> Iterator[Layer]:
        for node in self.graph.nodes:
            if isinstance(node, Input | Output | Reshape) or node.name in self.fused:
                continue
            yield from self._readout(node) if isinstance(node, Readout) else [self._layer(node)]

    def _layer(self, node: Node) -> Layer:
        paths = _one_of_each_control(
            path for edge in self.into.get(node.name, ()) for path in self._paths(node, edge)
        )
        gate = self._gate_of(node, paths)
        return Layer(
            node.name,
            node.kind,
            node.source,
            self.graph.blocks.get(node.name, ""),
            self.grid(node.name),
            tuple(paths),
            gate,
            depth=self.graph.depth.get(node.name, 0),
            table_bits=self._table_bits(node),
            lookup=len(node.table) if isinstance(node, HaltingScore) and node.table is not None
            else 0,
            heads=node.heads if isinstance(node, Attention) else 1,
        )  # fmt: skip

    def _gate_of(self, node: Node, paths: list[Path]) -> tuple[str, str] | None:
        if isinstance(node, Attention):
            gates = {self._own_gate(path.source) for path in paths}
            return gates.pop() if len(gates) == 1 else None
        return self._own_gate(node.name)

    def _own_gate(self, name: str) -> tuple[str, str] | None:
        edges = [e for e in self.into.get(name, ()) if e.target_port == "gate"]
        return (edges[0].source, edges[0].source_port) if edges else None

    def _table_bits(self, node: Node) -> int:
        if not isinstance(node, Attention):
            return 0
        return max(BYTE, math.ceil(math.log2(self.shapes[node.name, "out"][0] + 1)))

    def _paths(self, node: Node, edge: Edge) -> Iterator[Path]:
        """The path of one edge into a layer's node, and of the edges into its fused synapses."""
        source, _, flatten = self._behind(edge)
        if source in self.fused:
            synapse = self.nodes[source]
            gate = self._own_gate(source)
            for before in self.into[source]:
                if before.target_port == "in":
                    yield self._weighted(node.name, synapse, before, gate)
                else:
                    yield self._path(node.name, source, before, "control")
            return
        if isinstance(node, Conv | Linear) and edge.target_port == "in":
            yield self._weighted(node.name, node, edge, self._own_gate(node.name))
            return
        yield self._path(node.name, node.name, edge, _kind(node, edge.target_port), flatten)

    def _weighted(self, layer: str, node: Node, edge: Edge, gate: tuple[str, str] | None) -> Path:
        assert isinstance(node, Conv | Linear)
        source, port, flatten = self._behind(edge)
        kind: PathKind = "conv" if isinstance(node, Conv) else "linear"
        grid = self.grid(source, port)
        return Path(
            source, port, layer, node.name, kind, grid, flatten, edge.delay, edge.lag, gate, node
        )

    def _path(
        self, layer: str, counted: str, edge: Edge, kind: PathKind, flatten: bool = False
    ) -> Path:
        source, port, _ = self._behind(edge)
        node = self.nodes[counted]
        return Path(
            source, port, layer, counted, kind, self.grid(source, port), flatten,
            edge.delay, edge.lag,
            synapse=node if isinstance(node, OrPool) else None,
            heads=node.heads if isinstance(node, Attention) else 1,
        )  # fmt: skip

    def _behind(self, edge: Edge) -> tuple[str, str, bool]:
        """The value that an edge brings, seen through Reshapes; True if it was flattened."""
        source, port, flatten = edge.source, edge.source_port, False
        while isinstance(node := self.nodes[source], Reshape):
            before = self.into[source][0]
            shape = self.shapes[before.source, before.source_port]
            flatten |= node.to == "flatten" and len(shape) > 1
            source, port = before.source, before.source_port
        return source, port, flatten

    def _readout(self, node: Readout) -> Iterator[Layer]:
        edges = self.into.get(node.name, ())
        width = node.weight.shape[1]
        paths = []
        for edge in edges:
            kind: PathKind = "sum" if edge.target_port == "x" else "control"
            source, port, flatten = self._behind(edge)
            paths.append(
                Path(
                    source, port, node.name + SUMS, node.name, kind, self.grid(source, port),
                    flatten, edge.delay, edge.lag,
                )
            )  # fmt: skip
        block = self.graph.blocks.get(node.name, "")
        depth = self.graph.depth.get(node.name, 0)
        sums = Layer(
            node.name + SUMS, node.kind, node.source, block, Grid(1, width), tuple(paths),
            depth=depth,
        )  # fmt: skip
        classes = Path(sums.name, "out", node.name, node.name, "linear", sums.grid, synapse=node)
        yield sums
        yield Layer(
            node.name, node.kind, node.source, block, Grid(1, len(node.weight)), (classes,),
            weight_bits=_bits_of(node.weight), depth=depth,
        )  # fmt: skip


def _one_of_each_control(paths: Iterator[Path]) -> list[Path]:
    """A core needs to be told once that a gate has closed, whoever asks."""
    kept: list[Path] = []
    told: set[tuple[str, str]] = set()
    for path in paths:
        if path.kind != "control" or (path.source, path.port) not in told:
            kept.append(path)
        if path.kind == "control":
            told.add((path.source, path.port))
    return kept


def grid_of(shape: Shape) -> Grid:
    """Positions and channels of maps [C, H, W], tokens [N, D] or a flat vector [D]."""
    if len(shape) == 3:
        return Grid(shape[1] * shape[2], shape[0], True, (shape[1], shape[2]))
    if len(shape) == 2:
        return Grid(shape[0], shape[1])
    return Grid(1, shape[0])


def _kind(node: Node, port: str) -> PathKind:
    if port in CONTROL_PORTS:
        return "control"
    if isinstance(node, OrPool):
        return "pool"
    if isinstance(node, Attention):
        return "query" if port == "q" else "table"
    if isinstance(node, HaltingScore):
        return "score"
    return "same"


def _bits_of(weight: np.ndarray) -> int:
    """Bits of the widest weight, sign included, in whole bytes."""
    largest = int(np.abs(weight).max()) if weight.size and weight.dtype.kind in "iu" else 0
    return BYTE * max(1, math.ceil((math.ceil(math.log2(largest + 1)) + 1) / BYTE))


# --- geometry: which positions and channels a source reaches ---


@functools.lru_cache(maxsize=256)
def window_reach(path: Path) -> sp.csr_matrix:
    """How many windows of each target position hold each source position: [targets, sources]."""
    height, width = path.grid.size
    synapse = path.synapse
    assert isinstance(synapse, Conv | OrPool)
    kernel = synapse.kernel if isinstance(synapse, OrPool) else synapse.weight.shape[2:]
    dilation = (1, 1) if isinstance(synapse, OrPool) else synapse.dilation
    rows = _reach_1d(height, kernel[0], synapse.stride[0], synapse.padding[0], dilation[0])
    columns = _reach_1d(width, kernel[1], synapse.stride[1], synapse.padding[1], dilation[1])
    return sp.csr_matrix(sp.kron(rows, columns, format="csr"))


def _reach_1d(length: int, kernel: int, stride: int, padding: int, dilation: int) -> sp.csr_matrix:
    """[outputs, inputs]: 1 where an output's window holds the input."""
    outputs = (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    out, k = np.divmod(np.arange(outputs * kernel), kernel)
    at = out * stride - padding + k * dilation
    inside = (at >= 0) & (at < length)
    ones = np.ones(int(inside.sum()), np.int64)
    return sp.csr_matrix((ones, (out[inside], at[inside])), shape=(outputs, length))


def position_fan(path: Path, tile_of: np.ndarray, tiles: int) -> sp.csr_matrix:
    """Targets of each source position in each position tile: int64 [tiles, source positions].

    Args:
        path: the path; of a flattened one, the one position is that of the flat vector.
        tile_of: int [target positions], the tile of each. tiles: how many there are.
    """
    sources = 1 if path.flatten else path.grid.positions
    if path.kind in ("conv", "pool"):
        ones = np.ones(len(tile_of), np.int64)
        members = sp.csr_matrix(
            (ones, (tile_of, np.arange(len(tile_of)))), shape=(tiles, len(tile_of))
        )
        return sp.csr_matrix(members @ window_reach(path))
    if path.kind in ("table", "sum") or sources != len(tile_of):
        counts = np.bincount(tile_of, minlength=tiles)[:, None]
        return sp.csr_matrix(np.repeat(counts, sources, axis=1))
    ones = np.ones(sources, np.int64)
    return sp.csr_matrix((ones, (tile_of, np.arange(sources))), shape=(tiles, sources))


def channel_classes(path: Path, tile_of: np.ndarray, tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of source channels that meet the target's channel tiles alike.

    Returns:
        Class of each source channel (of a flattened path: of each element of the flat vector); and
        int64 [classes, tiles], the target channels of each tile that a channel of the class meets.
    """
    sources = path.grid.channels * (path.grid.positions if path.flatten else 1)
    counts = np.bincount(tile_of, minlength=tiles)
    if path.kind == "conv":
        assert isinstance(path.synapse, Conv)
        groups = path.synapse.groups
        group_of = np.arange(len(tile_of)) // (len(tile_of) // groups)
        fan = np.zeros((groups, tiles), np.int64)
        np.add.at(fan, (group_of, tile_of), 1)
        return np.arange(sources) // (sources // groups), fan
    if path.kind in ("query", "table"):
        head_of = np.arange(len(tile_of)) // (len(tile_of) // path.heads)
        fan = np.zeros((path.heads, tiles), np.int64)
        np.add.at(fan, (head_of, tile_of), 1)
        return head_of, fan
    if path.kind in ("linear", "control"):
        return np.zeros(sources, np.int64), counts[None]
    if path.kind == "score":
        fan = np.zeros((2, tiles), np.int64)
        fan[0] = counts
        return np.minimum(np.arange(sources), 1), fan
    return tile_of, np.eye(tiles, dtype=np.int64)
