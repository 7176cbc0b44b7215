"""The intermediate graph: what a network computes in one time step, free of torch and of any chip.

A `Graph` is a tuple of nodes in topological order and a tuple of edges. It is *float* (as captured)
or *quantised* (integers only). Every node has a unique `name`, and `source`, the qualified name of
the torch module it came from, so that every message can point at the user's own module.

Values per time step and image (batch and time are added by whoever executes the graph):
feature maps [C, H, W], tokens [N, D], flat vectors [D], per-token scalars [N], logits [classes].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy.typing as npt

from atsnn.fixed_point import NeuronConstants, NeuronModel
from export.errors import GraphError

Array = npt.NDArray
Shape = tuple[int, ...]
RESERVED_NAMES = frozenset({"logits", "images"})
"""What traces and exported files call their results and inputs; no node may be named so."""


@dataclass(frozen=True, eq=False)
class Node:
    """Common to all nodes: a unique name and the torch module that it came from."""

    name: str
    source: str
    inputs: ClassVar[tuple[str, ...]] = ("in",)
    optional_inputs: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("out",)

    @property
    def kind(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, eq=False)
class Input(Node):
    """The image, the same at every time step (direct coding), shape [C, H, W] or [D].

    `bits`: pixel resolution of a quantised graph; the integer p stands for p / (2^bits - 1).
    A float graph takes real values and has bits 0. Spiking input (events) has bits 1.
    """

    shape: Shape
    bits: int = 0
    inputs: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, eq=False)
class Selection(Node):
    """Tokens that are left out by a decision outside of the network: a score [N] per image.

    The same at every time step: 0 for a token that is processed, 1 (quantised: 4096) for one that
    is not. Whoever runs the graph hands it over beside the image. `tokens`: N.
    """

    tokens: int
    inputs: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, eq=False)
class Hold(Node):
    """The value of the first time step, at every step.

    Nodes that reach the output through a Hold only run at the first step, and rest afterwards.
    """


@dataclass(frozen=True, eq=False)
class Conv(Node):
    """2-D convolution [C, H, W] -> [O, H', W']. `weight` [O, C/groups, kh, kw], `bias` [O] or None.

    In a quantised graph `weight` is int32 and even, `bias` is None (it sits in the LIF node).
    """

    weight: Array
    bias: Array | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """Linear over the last axis, [N, I] -> [N, O] or [I] -> [O].

    `weight` [O, I], `bias` [O] or None.

    With a `gate` [N] only tokens whose gate is open are processed; the others give zero.
    """

    weight: Array
    bias: Array | None
    optional_inputs: ClassVar[tuple[str, ...]] = ("gate",)


@dataclass(frozen=True, eq=False)
class Norm(Node):
    """Batch normalisation in inference over the channel axis (0 of maps, last of tokens).

    Float graphs only.
    """

    mean: Array
    variance: Array
    weight: Array
    bias: Array
    epsilon: float


@dataclass(frozen=True, eq=False)
class LIF(Node):
    """Spiking neurons, one per element. Float: `model`; quantised: `constants` as well.

    With a `gate` [N] a neuron whose token's gate is closed keeps its state and fires nothing.
    `scale` (quantised): activation units per real unit of input current. State is zero at the first
    step of every image.
    """

    model: NeuronModel
    constants: NeuronConstants | None = None
    scale: float = 1.0
    optional_inputs: ClassVar[tuple[str, ...]] = ("gate",)


@dataclass(frozen=True, eq=False)
class OrPool(Node):
    """A pooled neuron fires if any neuron in its window did (max pooling of spikes)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Reshape(Node):
    """`tokens`: [C, H, W] -> [H*W, C] (token k = row-major grid cell); `flatten`: -> [C*H*W]."""

    to: Literal["tokens", "flatten"]


@dataclass(frozen=True, eq=False)
class Add(Node):
    """Sum of all edges into port `in`, in their order, each shifted left by its `shifts` entry."""

    shifts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Attention(Node):
    """Spiking self-attention without softmax, per head `scale * (q k^T) v`; all [N, D].

    A quantised graph holds plain coincidence counts (scale 1); the LIF behind it has the factor.
    """

    heads: int
    scale: float
    inputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class HaltingScore(Node):
    """Halting score of each token, [N, D] -> [N], from channel 0.

    Float: sigmoid(gamma * x_0 + beta). Quantised: `table[x_0]` in units of 1/4096.
    """

    gamma: float
    beta: float
    table: Array | None = None


@dataclass(frozen=True, eq=False)
class Gate(Node):
    """Opens [N] while the accumulated halting score is below `threshold`: 1 = token is processed.

    A(t) = (A(t-1) if accumulate else 0) + sum of all edges into `score`;
    out = alive * (A < threshold).
    Edges with `lag` 1 deliver the value of the previous time step (zero at the first).
    `threshold` is 1 - eps (float) or in units of 1/4096 (quantised).
    """

    threshold: float
    accumulate: bool
    inputs: ClassVar[tuple[str, ...]] = ("score",)
    optional_inputs: ClassVar[tuple[str, ...]] = ("alive",)


@dataclass(frozen=True, eq=False)
class Merge(Node):
    """Merge similar tokens, [N, D] -> [N, D]: bipartite matching of even tokens onto odd ones.

    Tokens are eligible whose gate is open when the assignment is made (t = 0; latched for the
    image). Of the edges (even a -> its most similar odd b; ties to the lower b), the `count` most
    similar (0: no limit) with similarity > 0 and >= `minimum_similarity` merge (ties: lower a).
    Outputs: `out` the stream, where b is replaced by the combination at every step and a is left
    as it is; `gate` = gate with the merged-away tokens closed; `alive` = alive with them 0; `size`.
    """

    count: int
    minimum_similarity: float
    combine: Literal["mean", "max", "keep"]
    similarity: Literal["stream", "keys"]
    assignment: Literal["first", "all"]
    inputs: ClassVar[tuple[str, ...]] = ("x", "gate")
    optional_inputs: ClassVar[tuple[str, ...]] = ("alive", "size", "keys")
    outputs: ClassVar[tuple[str, ...]] = ("out", "gate", "alive", "size")


@dataclass(frozen=True, eq=False)
class Readout(Node):
    """Logits of the image: W (mean over time of the size-weighted mean over tokens) + bias.

    `x` [N, D] (tokens, weighted by `size` [N], default 1) or [D].
    Quantised: logits = (weight @ sum_{t,k} size_k x_k + bias) / scale, with integer weight and
    bias; `scale` = weight scale * T * N * 2^F.
    """

    weight: Array
    bias: Array
    scale: float = 1.0
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    optional_inputs: ClassVar[tuple[str, ...]] = ("size",)


@dataclass(frozen=True, eq=False)
class Output(Node):
    """The network's result: logits of a Readout, or the spikes of a LIF (class = most spikes)."""


NODE_KINDS: dict[str, type[Node]] = {
    cls.__name__: cls
    for cls in (
        Input, Selection, Hold, Conv, Linear, Norm, LIF, OrPool, Reshape, Add,
        Attention, HaltingScore, Gate, Merge, Readout, Output,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Edge:
    """A value that flows from an output port to an input port.

    `lag`: time steps of the *image* that the value is late (feedback; 0 or 1).
    `delay`: hardware steps that a message waits so that rejoining branches meet (from `schedule`).
    """

    source: str
    target: str
    source_port: str = "out"
    target_port: str = "in"
    lag: int = 0
    delay: int = 0


@dataclass(frozen=True, eq=False)
class Graph:
    """A network for `steps` time steps per image.

    `depth` (set by `schedule`): hardware steps after the image's first step at which a node's first
    value appears. `fraction_bits`: F of the residual stream. `blocks`: node name -> block label
    ("stem", "block1", ..., "head"), the grain of the coarser Lava network.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    steps: int
    quantized: bool = False
    fraction_bits: int = 0
    depth: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"{name}: no such node in the graph; it has {len(self.nodes)} nodes")

    def into(self, name: str, port: str | None = None) -> tuple[Edge, ...]:
        """Edges into a node (or into one of its ports), in order."""
        return tuple(
            e for e in self.edges if e.target == name and (port is None or e.target_port == port)
        )

    def out_of(self, name: str, port: str | None = None) -> tuple[Edge, ...]:
        """Edges out of a node (or out of one of its ports), in order."""
        return tuple(
            e for e in self.edges if e.source == name and (port is None or e.source_port == port)
        )

    def of_kind(self, *kinds: type[Node]) -> Iterator[Node]:
        """Nodes of the given kinds in topological order."""
        return (node for node in self.nodes if isinstance(node, kinds))

    @property
    def input(self) -> Input:
        """The one Input node of a valid graph."""
        return next(node for node in self.nodes if isinstance(node, Input))

    @property
    def once(self) -> frozenset[str]:
        """Nodes that run at the first time step only: those that a Hold alone reads, and Holds."""
        found: set[str] = set()
        for node in reversed(self.nodes):
            targets = [edge.target for edge in self.edges if edge.source == node.name]
            if isinstance(node, Hold) or (targets and all(name in found for name in targets)):
                found.add(node.name)
        return frozenset(found)

    @property
    def block_gates(self) -> tuple[str, ...]:
        """Gates of blocks, in their order: those that more than a merging stage reads."""
        return tuple(
            gate.name
            for gate in self.of_kind(Gate)
            if any(not isinstance(self[edge.target], Merge) for edge in self.out_of(gate.name))
        )

    @property
    def feedback(self) -> bool:
        """True if a gate looks back from a later place: steps must run one after another."""
        return any(edge.lag for edge in self.edges)
