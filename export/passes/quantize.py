"""From real weights to the integers of a neuron core, with every rounding on record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from atsnn import fixed_point
from atsnn.fixed_point import (
    ACTIVATION_LIMIT,
    BIAS_EXPONENT_LIMIT,
    BIAS_MANTISSA_LIMIT,
    THRESHOLD_LIMIT,
    WEIGHT_MAX,
    NeuronConstants,
    NeuronModel,
)
from export.errors import GraphError
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
    Norm,
    Readout,
    Reshape,
    Selection,
    Shape,
)
from export.passes.base import GraphPass
from export.passes.rounding import (
    LayerRounding,
    growth,
    headroom,
    membrane_headroom,
    neuron_rounding,
    weight_rounding,
)
from export.ranges import Kind, Port, kinds
from export.shapes import PortShapes, channels, refuse, shapes
from export.validation import topological, validate

Synapse = Conv | Linear
SCORE_SCALE = float(fixed_point.SCORE_UNITY)
CONSTANT_WEIGHT = 2
"""Integer weight of average pooling: the smallest that an even-weight synapse holds."""


@dataclass(frozen=True)
class Quantize(GraphPass):
    """Give every layer integer weights and its neurons integer constants.

    Rewrites: Input takes `pixel_bits` (1 where the input is events); Conv and Linear get even 8-bit
    weights at the largest scale at which weights, activations, threshold and bias all fit, so that
    no input can overflow a current; their bias moves into the LIF; Attention becomes plain
    coincidence counts and its factor a threshold; sums on the residual stream get shifts;
    halting scores become tables; the read-out gets integers. Where a spike enters a neuron without
    a synapse, a relay synapse is put in between. Average pooling between layers becomes sums.

    Refuses: a Norm (fold it first), two synapses without a neuron between them, values of
    different scale that are added, neurons that cannot be held.

    Attributes:
        pixel_bits: upper bits of each 8-bit pixel that enter the network.
        fraction_bits: fractional bits of the residual stream; by default 3 if tokens are merged by
            their mean, otherwise 0.
        events: the input is spikes, not pixels.
        bias_exponent: hold every bias with this exponent (lava-dl netx knows 6 only); by default
            each layer takes the smallest that its biases fit.
    """

    pixel_bits: int = 6
    fraction_bits: int | None = None
    events: bool = False
    bias_exponent: int | None = None

    def rewrite(self, graph: Graph) -> Graph:
        if graph.quantized:
            raise GraphError("the graph is quantised already; start from the float graph")
        for norm in graph.of_kind(Norm):
            refuse(norm, "a quantised graph holds no normalisation", "run FoldNorm first")
        return self._quantizer(graph).run()

    def report(self, graph: Graph) -> tuple[LayerRounding, ...]:
        """What the pass rounds on this graph, layer by layer, in topological order."""
        quantizer = self._quantizer(validate(graph))
        quantizer.run()
        return tuple(quantizer.rounding)

    def _quantizer(self, graph: Graph) -> _Quantizer:
        graph = add_relays(graph)
        pixel_bits = 1 if self.events else self.pixel_bits
        return _Quantizer(graph, self._bits(graph), pixel_bits, self.bias_exponent)

    def _bits(self, graph: Graph) -> int:
        if self.fraction_bits is not None:
            return self.fraction_bits
        means = any(isinstance(n, Merge) and n.combine == "mean" for n in graph.nodes)
        return 3 if means else 0


# --- spikes that enter a neuron without a synapse ---


def add_relays(graph: Graph) -> Graph:
    """Put a synapse of weight 1 where a value enters a LIF, or a sum of currents, directly."""
    kind, sizes = kinds(graph), shapes(graph)
    nodes, edges = list(graph.nodes), []
    blocks = dict(graph.blocks)
    for edge in graph.edges:
        port = (edge.source, edge.source_port)
        if kind[port] == "current" or not _is_dendrite(graph, edge, kind):
            edges.append(edge)
            continue
        target = graph[edge.target]
        relay = _relay(f"{edge.source}>{edge.target}", target.source, sizes[port])
        nodes.append(relay)
        edges += [
            Edge(edge.source, relay.name, edge.source_port),
            replace(edge, source=relay.name, source_port="out"),
        ]
        if target.name in blocks:
            blocks[relay.name] = blocks[target.name]
    result = replace(graph, edges=tuple(edges), blocks=blocks)
    return replace(result, nodes=topological(tuple(nodes), result))


def _is_dendrite(graph: Graph, edge: Edge, kind: dict[Port, Kind]) -> bool:
    """True if the edge ends in a neuron, or in a sum of currents on the way to one."""
    target = graph[edge.target]
    if isinstance(target, LIF):
        return edge.target_port == "in"
    summing = isinstance(target, Add) and kind[target.name, "out"] == "current"
    return summing and _feeds_neuron(graph, target.name)


def _feeds_neuron(graph: Graph, name: str) -> bool:
    for edge in graph.out_of(name):
        target = graph[edge.target]
        if isinstance(target, LIF):
            return True
        if isinstance(target, Add | Reshape) and _feeds_neuron(graph, target.name):
            return True
    return False


def _relay(name: str, source: str, shape: Shape) -> Synapse:
    if len(shape) == 3:
        weight = np.ones((shape[0], 1, 1, 1), np.float32)
        return Conv(name, source, weight, None, groups=shape[0])
    return Linear(name, source, np.eye(shape[-1], dtype=np.float32), None)


# --- the pass ---


@dataclass(frozen=True)
class Scale:
    """How integers stand for reals: value = integer / unit, integer <= peak."""

    peak: int
    unit: float


@dataclass
class _Group:
    """Synapses and neurons that share one current, and so one scale."""

    synapses: list[Node] = field(default_factory=list)
    neurons: list[LIF] = field(default_factory=list)


class _Quantizer:
    """Walks a float graph from the input on; `scales` says what each port's integers stand for."""

    def __init__(
        self, graph: Graph, fraction_bits: int, pixel_bits: int, bias_exponent: int | None
    ) -> None:
        self.graph = graph
        self.bias_exponent = bias_exponent
        self.bits = fraction_bits
        self.pixel_bits = pixel_bits
        self.sizes: PortShapes = shapes(graph)
        self.scales: dict[Port, Scale] = {}
        self.done: dict[str, Node] = {}
        self.groups = _groups(graph)
        self.rounding: list[LayerRounding] = []

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if node.name in self.groups:
                self._visit_current(node)
            else:
                self.done[node.name] = self._quantized(node)
        return replace(
            self.graph,
            nodes=tuple(self.done[node.name] for node in self.graph.nodes),
            quantized=True,
            fraction_bits=self.bits,
            depth={},
        )

    def _quantized(self, node: Node) -> Node:
        if isinstance(node, Conv | Linear | Attention):
            return self._value_synapse(node)
        method = getattr(self, f"_{node.kind.lower()}", None)
        if method is not None:
            return method(node)
        if node.inputs:
            self.scales[node.name, node.outputs[0]] = self._arriving(node, node.inputs[0])[0]
        return node

    def _arriving(self, node: Node, port: str = "in") -> list[Scale]:
        return [
            self.scales[e.source, e.source_port]
            for e in self.graph.into(node.name, port)
            if not e.lag
        ]

    # values

    def _input(self, node: Input) -> Node:
        peak = 2**self.pixel_bits - 1
        self.scales[node.name, "out"] = Scale(peak, float(peak))
        return replace(node, bits=self.pixel_bits)

    def _selection(self, node: Selection) -> Node:
        self.scales[node.name, "out"] = Scale(fixed_point.SCORE_UNITY, SCORE_SCALE)
        return node

    def _add(self, node: Add) -> Node:
        parts = self._arriving(node)
        unit = max(part.unit for part in parts)
        if len(self.sizes[node.name, "out"]) > 1:
            unit = max(unit, 2.0**self.bits)
        shifts = tuple(_shift(node, part.unit, unit) for part in parts)
        peak = sum(part.peak << shift for part, shift in zip(parts, shifts, strict=True))
        self.scales[node.name, "out"] = Scale(peak, unit)
        return replace(node, shifts=shifts)

    def _halting_score_levels(self, node: HaltingScore) -> int:
        (stream,) = self._arriving(node)
        if stream.unit != 2.0**self.bits:
            refuse(
                node,
                f"the stream counts {stream.unit:g} per spike, the table expects {2**self.bits}",
                "let the halting score read the residual stream",
            )
        return stream.peak + 1

    def _haltingscore(self, node: HaltingScore) -> Node:
        levels = self._halting_score_levels(node)
        table = fixed_point.halting_table(node.gamma, node.beta, levels, self.bits)
        self.scales[node.name, "out"] = Scale(int(table.max()), SCORE_SCALE)
        return replace(node, table=table)

    def _gate(self, node: Gate) -> Node:
        self.scales[node.name, "out"] = Scale(1, 1.0)
        return replace(node, threshold=fixed_point.halting_threshold(1.0 - node.threshold))

    def _merge(self, node: Merge) -> Node:
        self.scales[node.name, "out"] = self._arriving(node, "x")[0]
        for port in ("gate", "alive", "size"):
            self.scales[node.name, port] = Scale(1, 1.0)
        return node

    def _readout(self, node: Readout) -> Node:
        (x,) = self._arriving(node, "x")
        shape = self._shape_into(node, "x")
        cells = self.graph.steps * (shape[0] if len(shape) == 2 else 1) * x.unit
        weight, bias, scale = fixed_point.quantize_readout(
            node.weight.astype(np.float64),
            node.bias.astype(np.float64),
            int(cells) if float(cells).is_integer() else cells,  # type: ignore[arg-type]
        )
        self.scales[node.name, "out"] = Scale(1, 1.0)
        return replace(node, weight=weight, bias=bias, scale=scale)

    def _shape_into(self, node: Node, port: str) -> Shape:
        (edge,) = self.graph.into(node.name, port)
        return self.sizes[edge.source, edge.source_port]

    # currents

    def _visit_current(self, node: Node) -> None:
        """A member of a group, which is quantised once all that enters its synapses is known."""
        if isinstance(node, LIF):
            self.scales[node.name, "out"] = Scale(1, 1.0)
        elif isinstance(node, Add | Reshape):
            self.done[node.name] = node
        elif node.name not in self.done:
            group = self.groups[node.name]
            if all(self._ready(synapse) for synapse in group.synapses):
                self._quantize_group(group)

    def _ready(self, node: Node) -> bool:
        return all((e.source, e.source_port) in self.scales for e in self.graph.into(node.name))

    def _value_synapse(self, node: Node) -> Node:
        """A synapse that feeds no neuron: average pooling, whose sums travel as graded values."""
        if not isinstance(node, Conv) or not _is_average(node):
            reader = next(iter(self.graph.out_of(node.name)), None)
            refuse(
                node,
                f"its current goes to {reader.target if reader else 'nothing'}, not to a neuron",
                "put a spiking neuron behind it",
            )
        (x,) = self._arriving(node)
        window = int(np.prod(node.weight.shape[1:]))
        unit = x.unit * CONSTANT_WEIGHT / float(node.weight.flat[0])
        rounded = round(unit)
        unit = float(rounded) if math.isclose(unit, rounded, rel_tol=1e-6) else unit
        self.scales[node.name, "out"] = Scale(x.peak * CONSTANT_WEIGHT * window, unit)
        return replace(node, weight=np.full(node.weight.shape, CONSTANT_WEIGHT, np.int16))

    def _quantize_group(self, group: _Group) -> None:
        entries = [self._entry(synapse) for synapse in group.synapses]
        models = [neuron.model for neuron in group.neurons]
        scale, weights = _choose(entries, models, self.graph.steps, self.bias_exponent)
        for entry, weight in zip(entries, weights, strict=True):
            node = entry.node
            if isinstance(node, Attention):
                self.done[node.name] = replace(node, scale=1.0)
            else:
                assert isinstance(node, Conv | Linear)
                self.done[node.name] = replace(node, weight=weight.astype(np.int16), bias=None)
        for neuron in group.neurons:
            bias = self._bias_of(neuron)
            constants = fixed_point.neuron_constants(neuron.model, scale, bias)
            if self.bias_exponent is not None:
                constants = _with_exponent(neuron, constants, scale, bias, self.bias_exponent)
            if not 1 <= constants.threshold <= THRESHOLD_LIMIT:
                refuse(
                    neuron,
                    f"its threshold is {constants.threshold} at scale {scale:g}, the core holds 1 "
                    f"to {THRESHOLD_LIMIT}",
                    "its weights are too large or too small against v_th: train it again",
                )
            self.done[neuron.name] = replace(neuron, constants=constants, scale=scale)
            pairs = zip(entries, weights, strict=True)
            self.rounding += [self._rounding(e, w, neuron, scale, bias) for e, w in pairs]

    def _rounding(
        self,
        entry: _Entry,
        integers: npt.NDArray[np.int32],
        neuron: LIF,
        scale: float,
        bias: npt.NDArray[np.float64],
    ) -> LayerRounding:
        done = self.done[neuron.name]
        assert isinstance(done, LIF)
        assert done.constants is not None
        bits, error, zeroed = weight_rounding(entry.weight, integers, scale / entry.arriving.unit)
        bound = entry.bound(integers)
        return LayerRounding(
            entry.node.name,
            entry.node.source,
            neuron.name,
            scale,
            bits,
            error,
            zeroed,
            *neuron_rounding(neuron.model, done.constants, scale, bias),
            bound,
            headroom(bound),
            membrane_headroom(neuron.model, done.constants, bound, self.graph.steps),
        )

    def _entry(self, node: Node) -> _Entry:
        if isinstance(node, Attention):
            parts = [self._arriving(node, port)[0] for port in ("q", "k", "v")]
            if any(part != Scale(1, 1.0) for part in parts):
                refuse(node, "q, k or v are not spikes", "put neurons before the attention")
            tokens, features = self.sizes[node.name, "out"]
            return _Entry(node, np.zeros((1, 1)), Scale(1, 1.0), tokens * features // node.heads)
        (x,) = self._arriving(node)
        assert isinstance(node, Conv | Linear)
        return _Entry(node, node.weight.astype(np.float64), x, 0)

    def _bias_of(self, neuron: LIF) -> npt.NDArray[np.float64]:
        """Bias of all synapses that feed a neuron, in the neuron's channels."""
        (edge,) = self.graph.into(neuron.name, "in")
        return self._bias_at(edge.source)

    def _bias_at(self, name: str) -> npt.NDArray[np.float64]:
        node, shape = self.graph[name], self.sizes[name, "out"]
        if isinstance(node, Add):
            return sum(
                (self._bias_at(e.source) for e in self.graph.into(name)),
                np.zeros(channels(shape)),
            )
        if isinstance(node, Reshape):
            before = self._bias_at(self.graph.into(name)[0].source)
            return before if node.to == "tokens" else self._flat(before, node)
        bias = getattr(node, "bias", None)
        return np.zeros(channels(shape)) if bias is None else bias.astype(np.float64)

    def _flat(self, bias: npt.NDArray[np.float64], node: Reshape) -> npt.NDArray[np.float64]:
        shape = self._shape_into(node, "in")
        column = bias.reshape(-1, 1, 1) if len(shape) == 3 else bias
        return np.broadcast_to(column, shape).reshape(-1)


def _with_exponent(
    neuron: LIF,
    constants: NeuronConstants,
    scale: float,
    bias: npt.NDArray[np.float64],
    exponent: int,
) -> NeuronConstants:
    drive = (bias + neuron.model.leak) * scale * 2**fixed_point.ACTIVATION_SHIFT
    mantissa = np.rint(drive / 2**exponent).astype(np.int32)
    largest = int(np.abs(mantissa).max(initial=0))
    if largest > BIAS_MANTISSA_LIMIT:
        refuse(
            neuron,
            f"its bias needs the mantissa {largest} at exponent {exponent}, the core holds "
            f"{BIAS_MANTISSA_LIMIT}",
            "use a larger bias_exponent",
        )
    return replace(constants, bias_mantissa=mantissa, bias_exponent=exponent)


def _is_average(node: Conv) -> bool:
    depthwise = node.weight.shape[1] == 1 and node.groups == node.weight.shape[0]
    constant = np.ptp(node.weight) == 0 and node.weight.flat[0] > 0
    return depthwise and constant and node.bias is None


def _shift(node: Node, unit: float, target: float) -> int:
    shift = math.log2(target / unit)
    if not shift.is_integer():
        refuse(
            node,
            f"it adds values that count {unit:g} and {target:g} per unit",
            "add spikes to spikes and pooled values to pooled values of the same window",
        )
    return int(shift)


# --- which synapses and neurons share a current ---


def _groups(graph: Graph) -> dict[str, _Group]:
    """Group by name of each synapse, neuron and sum of currents that takes part in one."""
    found: dict[str, _Group] = {}
    for neuron in graph.of_kind(LIF):
        assert isinstance(neuron, LIF)
        chain = list(_upstream(graph, neuron.name, "in"))
        group = next((found[node.name] for node in chain if node.name in found), _Group())
        group.neurons.append(neuron)
        for node in (neuron, *chain):
            if node.name not in found and isinstance(node, Conv | Linear | Attention):
                group.synapses.append(node)
            found[node.name] = group
    _check_split(graph, found)
    return found


def _upstream(graph: Graph, name: str, port: str | None = None) -> Iterator[Node]:
    """Reshapes and sums before a node, and the synapses that begin them."""
    for edge in graph.into(name, port):
        node = graph[edge.source]
        if isinstance(node, Conv | Linear | Attention | Reshape | Add | Norm):
            yield node
            if isinstance(node, Reshape | Add):
                yield from _upstream(graph, node.name)


def _check_split(graph: Graph, groups: dict[str, _Group]) -> None:
    for edge in graph.edges:
        source, target = graph[edge.source], graph[edge.target]
        leaves = edge.source in groups and not isinstance(source, LIF)
        if leaves and not isinstance(target, LIF) and edge.target not in groups:
            refuse(
                source,
                f"its current goes to neurons and to {target.kind} {target.name}",
                "give each its own synapse",
            )


# --- the choice of a scale ---


@dataclass(frozen=True)
class _Entry:
    """A synapse of a group: real weights, what arrives, and for attention its largest count."""

    node: Node
    weight: npt.NDArray[np.float64]
    arriving: Scale
    counts: int

    def integers(self, scale: float) -> npt.NDArray[np.int32]:
        return fixed_point.even_weights(self.weight, scale / self.arriving.unit)

    def bound(self, integers: npt.NDArray[np.int32]) -> int:
        return self.counts or fixed_point.activation_bound(integers, self.arriving.peak)


def _choose(
    entries: list[_Entry], models: Iterable[NeuronModel], steps: int, bias_exponent: int | None
) -> tuple[float, list[npt.NDArray[np.int32]]]:
    """Scale of the current and the integer weights at that scale."""
    models = list(models)
    memory = max(growth(1.0 - model.current_rate, steps) for model in models)
    attentions = [entry for entry in entries if isinstance(entry.node, Attention)]
    if attentions:
        scale = _attention_scale(attentions)
        return scale, _fitted(entries, scale, memory)
    first = entries[0]
    if len(entries) == 1 and len(models) == 1 and bias_exponent is None:
        bias = getattr(first.node, "bias", None)
        quantized = fixed_point.quantize_synapse(
            first.weight,
            np.zeros(len(first.weight)) if bias is None else bias.astype(np.float64),
            models[0],
            math.ceil(first.arriving.peak * memory),
            first.arriving.unit,
        )
        return quantized.scale, [quantized.weight]
    exponent = BIAS_EXPONENT_LIMIT if bias_exponent is None else bias_exponent
    scale = min(_limit(entries, model, memory, exponent) for model in models)
    while True:
        weights = [entry.integers(scale) for entry in entries]
        total = memory * sum(e.bound(w) for e, w in zip(entries, weights, strict=True))
        if total <= ACTIVATION_LIMIT:
            return scale, weights
        scale *= 0.999 * ACTIVATION_LIMIT / total


def _attention_scale(entries: list[_Entry]) -> float:
    scales = {entry.node.scale for entry in entries if isinstance(entry.node, Attention)}
    if len(scales) > 1:
        refuse(
            entries[0].node,
            f"it adds attentions of scales {sorted(scales)}",
            "use one scale for all of them",
        )
    return 1.0 / scales.pop()


def _fitted(entries: list[_Entry], scale: float, memory: float) -> list[npt.NDArray[np.int32]]:
    weights = [entry.integers(scale) for entry in entries]
    total = memory * sum(e.bound(w) for e, w in zip(entries, weights, strict=True))
    if total > ACTIVATION_LIMIT:
        refuse(
            entries[0].node,
            f"its coincidences can add up to {total:.0f}, a current holds {ACTIVATION_LIMIT}",
            "use fewer tokens or smaller heads",
        )
    return weights


def _limit(entries: list[_Entry], model: NeuronModel, memory: float, bias_exponent: int) -> float:
    """Largest scale at which weights, activations, threshold and biases fit."""
    candidates = [THRESHOLD_LIMIT / (model.gain * model.threshold)]
    reach = bias = 0.0
    for entry in entries:
        flat = entry.weight.reshape(len(entry.weight), -1) / entry.arriving.unit
        largest = float(np.abs(flat).max(initial=0.0))
        if largest > 0:
            candidates.append(WEIGHT_MAX / largest)
        sums = max(np.maximum(flat, 0).sum(1).max(), np.maximum(-flat, 0).sum(1).max())
        reach += float(sums) * entry.arriving.peak
        own = getattr(entry.node, "bias", None)
        bias += 0.0 if own is None else float(np.abs(own).max(initial=0.0))
    if reach > 0:
        candidates.append(ACTIVATION_LIMIT / (reach * memory))
    if bias + abs(model.leak) > 0:
        fits = (BIAS_MANTISSA_LIMIT << bias_exponent) / 2**fixed_point.ACTIVATION_SHIFT
        candidates.append(fits / (bias + abs(model.leak)))
    return min(candidates)
