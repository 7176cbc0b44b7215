"""A quantised graph as one ONNX model: time unrolled, halting and merging inside, masked form.

float32 carries exact integers, int64 the membranes, float64 what is compared or divided; so that
any conforming runtime gives the same spikes. Inputs: `images`, uint8 [batch, *shape] (events:
[T, batch, *shape]). Outputs: `logits`, float64 [batch, classes]; every gate, uint8 [T, batch, N],
under its node's name; on request the spikes of every layer, bool [T, batch, ...].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from atsnn.files import write_atomically
from atsnn.fixed_point import (
    ACTIVATION_LIMIT,
    ACTIVATION_SHIFT,
    DECAY_UNITY,
    EXACT_FLOAT32,
    MERGE_UNITY,
    STATE_LIMIT,
)
from export.errors import UnsupportedTargetError
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Gate,
    Graph,
    HaltingScore,
    Hold,
    Input,
    Linear,
    Merge,
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
    Selection,
)
from export.ranges import maxima
from export.shapes import shapes
from export.validation import validate

OPSET, IR_VERSION = 17, 9
PROTOBUF_LIMIT = 2_000_000_000
Names = dict[str, list[str]]
"""Tensor names that arrive at a node at one step, by input port, in the order of the edges."""


def to_onnx(graph: Graph, *, spikes: bool = False, events: bool = False) -> onnx.ModelProto:
    """Build and check the ONNX model of a quantised graph.

    Args:
        graph: quantised.
        spikes: also output the spikes of every LIF and OrPool node.
        events: the model takes events [T, batch, ...] instead of images (1-bit inputs only).

    Raises:
        UnsupportedTargetError: events on a graph that takes pixels, a float graph, or one that
            is too large for one ONNX file.
    """
    validate(graph)
    if not graph.quantized:
        raise UnsupportedTargetError("the graph is a float graph; run the quantize pass first")
    for node in graph.of_kind(Selection, Hold):
        raise UnsupportedTargetError(
            f"{node.kind} {node.name} has no ONNX form here: run this graph in the engine or in "
            "torch"
        )
    for node in graph.of_kind(Merge):
        assert isinstance(node, Merge)
        if graph.feedback and node.assignment == "all":
            raise UnsupportedTargetError(
                f"{node.name} merges by all steps and gates look back step by step; use assignment "
                "'first'"
            )
    if events and graph.input.bits != 1:
        raise UnsupportedTargetError(
            f"{graph.input.name} takes pixels of {graph.input.bits} bits, events have 1; quantise "
            "with Quantize(events=True)"
        )
    model = _Exporter(graph, spikes, events).build()
    size = model.ByteSize()
    if size > PROTOBUF_LIMIT:
        raise UnsupportedTargetError(
            f"the model takes {size} bytes, one ONNX file holds {PROTOBUF_LIMIT}; "
            "export a model with fewer blocks"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, ValueError) as error:
        detail = " ".join(str(error).split())[:300]
        raise UnsupportedTargetError(f"the graph makes no valid ONNX model: {detail}") from error
    return model


def save_onnx(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    spikes: bool = False,
    events: bool = False,
) -> Path:
    """Write `to_onnx(graph)` to a file, whole or not at all.

    Raises:
        UnsupportedTargetError: see `to_onnx`, or the file cannot be written.
    """
    target = Path(path)
    content = to_onnx(graph, spikes=spikes, events=events).SerializeToString()
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UnsupportedTargetError(
            f"{target}: cannot write {len(content)} bytes ({error.strerror or error}); "
            "what was there before is unchanged"
        ) from None
    return target


def onnx_trace(
    model: onnx.ModelProto | str | os.PathLike[str], images: npt.NDArray[np.uint8]
) -> dict[str, npt.NDArray]:
    """Run an ONNX model of ours in onnxruntime: outputs by name.

    Raises:
        UnsupportedTargetError: onnxruntime cannot load it, or the images do not fit.
    """
    import onnxruntime

    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {"images": images})
    except Exception as error:  # onnxruntime has no common base of its errors
        detail = " ".join(str(error).split())[:300]
        raise UnsupportedTargetError(f"onnxruntime: {detail}") from error
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


class _Exporter:
    """Collects ONNX nodes; `values` holds the tensor of every graph port at each time step."""

    def __init__(self, graph: Graph, spikes: bool, events: bool) -> None:
        self.graph = graph
        self.events = events
        self.spikes = spikes
        self.shapes = shapes(graph)
        self.maxima = maxima(graph)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self.values: dict[tuple[str, str, int], str] = {}
        self.state: dict[tuple[str, str], str] = {}
        self.outputs: list[onnx.ValueInfoProto] = []

    def build(self) -> onnx.ModelProto:
        """The whole model."""
        entry = self.graph.input
        axes = (self.graph.steps, "batch") if self.events else ("batch",)
        image = helper.make_tensor_value_info("images", TensorProto.UINT8, [*axes, *entry.shape])
        steps, nodes = range(self.graph.steps), self.graph.nodes
        order = product(steps, nodes) if self.graph.feedback else _layer_by_layer(nodes, steps)
        for t, node in order:
            self._emit(node, t)
        self._logits()
        self._traces()
        graph = helper.make_graph(
            self.nodes, "atsnn", [image], self.outputs, list(self.constants.values())
        )
        return helper.make_model(
            graph,
            producer_name="atsnn",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )

    # building blocks

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add one ONNX node; returns the name of its output."""
        name = f"/v{len(self.nodes)}"  # no node of a graph has a / in its name
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: npt.DTypeLike) -> str:
        """Name of an initializer, shared by equal values."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"/c{len(self.constants)}"
            self.constants[key] = numpy_helper.from_array(array, name)
        return self.constants[key].name

    def cast(self, name: str, kind: int) -> str:
        return self.op("Cast", name, to=kind)

    def double(self, name: str) -> str:
        return self.cast(name, TensorProto.DOUBLE)

    def column(self, name: str, axis: int = -1) -> str:
        """With one more axis of size 1."""
        return self.op("Unsqueeze", name, self.constant([axis], np.int64))

    def total(self, name: str, axis: int) -> str:
        """Sum over one axis, which disappears."""
        return self.op("ReduceSum", name, self.constant([axis], np.int64), keepdims=0)

    def rows(self, name: str, indices: npt.ArrayLike, axis: int = 1) -> str:
        return self.op("Gather", name, self.constant(indices, np.int64), axis=axis)

    # walking the graph

    def _emit(self, node: Node, t: int) -> None:
        arriving: Names = {}
        for edge in self.graph.into(node.name):
            when = t - edge.lag
            if when >= 0:
                name = self.values[edge.source, edge.source_port, when]
                arriving.setdefault(edge.target_port, []).append(name)
            elif edge.lag:
                arriving.setdefault(edge.target_port, [])
        results = _EMITTERS[node.kind](self, node, arriving, t)
        for port, name in zip(node.outputs, results, strict=True):
            self.values[node.name, port, t] = name

    def same(self, node: Node, arriving: Names, t: int) -> str | None:
        """The tensor of the step before, if nothing that arrives has changed since."""
        if t == 0:
            return None
        before = [self.values[e.source, e.source_port, t - 1] for e in self.graph.into(node.name)]
        now = [name for names in arriving.values() for name in names]
        return self.values[node.name, "out", t - 1] if sorted(before) == sorted(now) else None

    def zeros(self, features: int) -> str:
        """float32 [batch, features] of zeros."""
        batch = self.op(
            "Gather",
            self.op("Shape", "images"),
            self.constant([int(self.events)], np.int64),
        )
        shape = self.op("Concat", batch, self.constant([features], np.int64), axis=0)
        return self.op("Expand", self.constant([[0.0]], np.float32), shape)

    # results

    def _logits(self) -> None:
        output = next(self.graph.of_kind(Output))
        (edge,) = self.graph.into(output.name)
        steps = [self.values[edge.source, edge.source_port, t] for t in range(self.graph.steps)]
        node = self.graph[edge.source]
        if isinstance(node, Readout):
            weighted = self.op("MatMul", steps[-1], self.constant(node.weight.T, np.float64))
            logits = self.op("Add", weighted, self.constant(node.bias, np.float64))
            logits = self.op("Div", logits, self.constant(node.scale, np.float64))
        else:
            counts = self.op("Sum", *steps) if len(steps) > 1 else steps[0]
            logits = self.double(counts)
        self._output(
            logits, "logits", TensorProto.DOUBLE, ("batch", *self.shapes[node.name, "out"])
        )

    def _traces(self) -> None:
        wanted = (LIF, OrPool, Gate) if self.spikes else (Gate,)
        for node in self.graph.of_kind(*wanted):
            steps = [
                self.column(self.values[node.name, "out", t], 0) for t in range(self.graph.steps)
            ]
            kind = TensorProto.UINT8 if isinstance(node, Gate) else TensorProto.BOOL
            stacked = self.cast(self.op("Concat", *steps, axis=0), kind)
            shape = (self.graph.steps, "batch", *self.shapes[node.name, "out"])
            self._output(stacked, node.name, kind, shape)

    def _output(self, tensor: str, name: str, kind: int, shape: tuple[int | str, ...]) -> None:
        self.nodes.append(helper.make_node("Identity", [tensor], [name], name=f"output {name}"))
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))


def _layer_by_layer(nodes: tuple[Node, ...], steps: range) -> Iterator[tuple[int, Node]]:
    """All steps of a node before the next, so that a Merge can see all of them."""
    return ((t, node) for node, t in product(nodes, steps))


# --- one function per kind of node: tensors that arrive -> tensors of its output ports ---


def _input(x: _Exporter, node: Input, _: Names, t: int) -> list[str]:
    if x.events:
        return [x.cast(x.op("Gather", "images", x.constant(t, np.int64)), TensorProto.FLOAT)]
    if t:
        return [x.values[node.name, "out", 0]]
    pixels = x.cast("images", TensorProto.FLOAT)
    scaled = x.op("Mul", pixels, x.constant(2.0 ** (node.bits - 8), np.float32))
    return [x.op("Floor", scaled)]


def _exact(x: _Exporter, node: Node) -> npt.DTypeLike:
    """float64 where sums may leave the integers that float32 holds."""
    return np.float64 if x.maxima[node.name, "out"] > EXACT_FLOAT32 else np.float32


def _conv(x: _Exporter, node: Conv, arriving: Names, t: int) -> list[str]:
    before = x.same(node, arriving, t)
    if before is not None:
        return [before]
    (value,) = arriving["in"]
    dtype = _exact(x, node)
    value = x.double(value) if dtype == np.float64 else value
    return [
        x.op(
            "Conv",
            value,
            x.constant(node.weight, dtype),
            strides=list(node.stride),
            pads=[*node.padding, *node.padding],
            dilations=list(node.dilation),
            group=node.groups,
            kernel_shape=list(node.weight.shape[2:]),
        )
    ]


def _linear(x: _Exporter, node: Linear, arriving: Names, t: int) -> list[str]:
    before = x.same(node, arriving, t)
    if before is not None:
        return [before]
    (value,) = arriving["in"]
    dtype = _exact(x, node)
    value = x.double(value) if dtype == np.float64 else value
    out = x.op("MatMul", value, x.constant(node.weight.T, dtype))
    if "gate" in arriving:
        gate = x.column(arriving["gate"][0])
        out = x.op("Mul", out, x.double(gate) if dtype == np.float64 else gate)
    return [out]


def _lif(x: _Exporter, node: LIF, arriving: Names, t: int) -> list[str]:
    constants = node.constants
    assert constants is not None
    current = _current(x, node, arriving["in"][0], t)
    shape = x.shapes[node.name, "out"]
    bias = constants.bias.reshape(-1, 1, 1) if len(shape) == 3 else constants.bias
    voltage = x.op("Add", current, x.constant(bias, np.int64))
    if t:
        voltage = x.op("Add", voltage, _decayed(x, x.state[node.name, "voltage"], constants.dv))
    voltage = x.op(
        "Clip", voltage, x.constant(-STATE_LIMIT, np.int64), x.constant(STATE_LIMIT, np.int64)
    )
    level = x.constant(constants.threshold << ACTIVATION_SHIFT, np.int64)
    fired = x.op("Greater", voltage, level)
    zero = x.constant(0, np.int64)
    voltage = x.op("Where", fired, zero, voltage)
    if "gate" in arriving:
        opened = x.column(x.cast(arriving["gate"][0], TensorProto.BOOL))
        fired = x.op("And", fired, opened)
        voltage = x.op("Where", opened, voltage, x.state.get((node.name, "voltage"), zero))
        current = x.op("Where", opened, current, x.state.get((node.name, "current"), zero))
    x.state[node.name, "voltage"], x.state[node.name, "current"] = voltage, current
    return [x.cast(fired, TensorProto.FLOAT)]


def _current(x: _Exporter, node: LIF, activation: str, t: int) -> str:
    constants = node.constants
    assert constants is not None
    unit = x.constant(2**ACTIVATION_SHIFT, np.int64)
    current = x.op("Mul", x.cast(activation, TensorProto.INT64), unit)
    remembers = constants.du + 1 < DECAY_UNITY
    if remembers and t:
        before = _decayed(x, x.state[node.name, "current"], constants.du + 1)
        current = x.op("Add", current, before)
    (edge,) = x.graph.into(node.name, "in")
    if not remembers and x.maxima[edge.source, edge.source_port] <= ACTIVATION_LIMIT:
        return current
    limit = x.constant(STATE_LIMIT, np.int64)
    shifted = x.op("Mod", x.op("Add", current, limit), x.constant(2**24, np.int64))
    return x.op("Sub", shifted, limit)


def _decayed(x: _Exporter, state: str, constant: int) -> str:
    """ONNX divides integers toward zero, as the core's decay rounds."""
    scaled = x.op("Mul", state, x.constant(DECAY_UNITY - constant, np.int64))
    return x.op("Div", scaled, x.constant(DECAY_UNITY, np.int64))


def _or_pool(x: _Exporter, node: OrPool, arriving: Names, _: int) -> list[str]:
    return [
        x.op(
            "MaxPool",
            arriving["in"][0],
            kernel_shape=list(node.kernel),
            strides=list(node.stride),
            pads=[*node.padding, *node.padding],
        )
    ]


def _reshape(x: _Exporter, node: Reshape, arriving: Names, t: int) -> list[str]:
    before = x.same(node, arriving, t)
    if before is not None:
        return [before]
    (value,) = arriving["in"]
    if node.to == "flatten":
        return [x.op("Reshape", value, x.constant([0, -1], np.int64))]
    channels = x.shapes[node.name, "out"][1]
    flat = x.op("Reshape", value, x.constant([0, channels, -1], np.int64))
    return [x.op("Transpose", flat, perm=[0, 2, 1])]


def _add(x: _Exporter, node: Add, arriving: Names, _: int) -> list[str]:
    parts = [
        x.op("Mul", name, x.constant(2.0**shift, np.float32)) if shift else name
        for name, shift in zip(arriving["in"], node.shifts, strict=True)
    ]
    return [x.op("Sum", *parts) if len(parts) > 1 else parts[0]]


def _attention(x: _Exporter, node: Attention, arriving: Names, _: int) -> list[str]:
    tokens, features = x.shapes[node.name, "out"]
    split = x.constant([0, tokens, node.heads, features // node.heads], np.int64)

    def heads(port: str, perm: list[int]) -> str:
        return x.op("Transpose", x.op("Reshape", arriving[port][0], split), perm=perm)

    table = x.op("MatMul", heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3]))
    mixed = x.op("MatMul", heads("q", [0, 2, 1, 3]), table)
    joined = x.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return [x.op("Reshape", joined, x.constant([0, tokens, features], np.int64))]


def _halting_score(x: _Exporter, node: HaltingScore, arriving: Names, _: int) -> list[str]:
    channel = x.op("Gather", arriving["in"][0], x.constant(0, np.int64), axis=2)
    index = x.cast(channel, TensorProto.INT64)
    return [x.op("Gather", x.constant(node.table, np.float32), index)]


def _gate(x: _Exporter, node: Gate, arriving: Names, t: int) -> list[str]:
    parts = list(arriving["score"])
    if node.accumulate and t:
        parts.append(x.state[node.name, "total"])
    if not parts:
        parts = [x.zeros(x.shapes[node.name, "out"][0])]
    total = x.op("Sum", *parts) if len(parts) > 1 else parts[0]
    x.state[node.name, "total"] = total
    opened = x.op("Less", total, x.constant(node.threshold, np.float32))
    gate = x.cast(opened, TensorProto.FLOAT)
    return [x.op("Mul", gate, arriving["alive"][0]) if "alive" in arriving else gate]


def _merge(x: _Exporter, node: Merge, arriving: Names, t: int) -> list[str]:
    tokens = x.shapes[node.name, "out"][0]
    half = _Halves(x, tokens)
    value, gate = arriving["x"][0], arriving["gate"][0]
    ones = x.constant(np.ones((1, tokens)), np.float32)
    alive = arriving["alive"][0] if "alive" in arriving else ones
    size = arriving["size"][0] if "size" in arriving else ones
    if t == 0:
        eligible = x.op("Mul", gate, alive)
        x.state[node.name, "pairs"] = _pairs(x, node, half, _compared(x, node), eligible)
    pairs = x.state[node.name, "pairs"]
    stays = half.joined(
        x.op("Sub", x.constant(1.0, np.float32), x.total(pairs, 2)),
        x.constant(np.ones((1, tokens // 2)), np.float32),
    )
    even_size, odd_size = half.split(size)
    arriving_size = x.op("Mul", pairs, x.column(even_size))
    total = x.op("Add", odd_size, x.total(arriving_size, 1))
    odd = _COMBINE[node.combine](x, half, value, pairs, arriving_size, total, odd_size)
    return [
        half.joined(half.even(value), odd),
        x.op("Mul", gate, stays),
        x.op("Mul", alive, stays),
        half.joined(x.op("Mul", even_size, half.even(stays)), total),
    ]


def _compared(x: _Exporter, node: Merge) -> str:
    """Features that are compared; those of all steps stand side by side."""
    (edge,) = x.graph.into(node.name, "keys" if node.similarity == "keys" else "x")
    steps = range(x.graph.steps if node.assignment == "all" else 1)
    parts = [x.values[edge.source, edge.source_port, t] for t in steps]
    return x.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]


class _Halves:
    """Even and odd tokens (axis 1), apart and together again."""

    def __init__(self, x: _Exporter, tokens: int) -> None:
        self.x = x
        self.evens, self.odds = np.arange(0, tokens, 2), np.arange(1, tokens, 2)
        order = np.concatenate([self.evens, self.odds])
        self.back = np.argsort(order)

    def even(self, name: str) -> str:
        return self.x.rows(name, self.evens)

    def odd(self, name: str) -> str:
        return self.x.rows(name, self.odds)

    def split(self, name: str) -> tuple[str, str]:
        return self.even(name), self.odd(name)

    def joined(self, even: str, odd: str) -> str:
        like = self.x.op("Expand", odd, self._batch_of(even, odd))
        return self.x.rows(self.x.op("Concat", even, like, axis=1), self.back)

    def _batch_of(self, even: str, odd: str) -> str:
        """Shape of `odd` with the batch of `even`: a constant half has batch 1."""
        x = self.x
        batch = x.op("Gather", x.op("Shape", even), x.constant([0], np.int64))
        rest = x.op(
            "Slice", x.op("Shape", odd), x.constant([1], np.int64), x.constant([99], np.int64)
        )
        return x.op("Concat", batch, rest, axis=0)


def _pairs(x: _Exporter, node: Merge, half: _Halves, compared: str, eligible: str) -> str:
    """float32 [batch, even, odd]: 1 where an even token joins an odd one."""
    features = x.double(compared)
    even, odd = half.split(features)
    # Einsum, since onnxruntime fuses a transposed float64 MatMul into a kernel that it lacks
    dot = x.op("Einsum", even, odd, equation="bad,bcd->bac")
    zero = x.constant(0.0, np.float64)
    norms, usable = [], []
    for side, opened in zip((even, odd), half.split(eligible), strict=True):
        norm = x.total(x.op("Mul", side, side), 2)
        positive = x.op("Greater", norm, zero)
        usable.append(x.op("And", x.cast(opened, TensorProto.BOOL), positive))
        norms.append(norm)
    allowed = x.op("And", x.column(usable[0]), x.column(usable[1], 1))
    product = x.op("Mul", x.column(norms[0]), x.column(norms[1], 1))
    divisor = x.op("Where", allowed, product, x.constant(1.0, np.float64))
    signed = x.op("Mul", dot, x.op("Abs", dot))
    squared = x.op("Div", signed, divisor)
    similarity = x.op("Where", allowed, squared, x.constant(-1.0, np.float64))
    best = x.op("ReduceMax", similarity, axes=[2], keepdims=0)
    partner = x.op("ArgMax", similarity, axis=2, keepdims=0)
    merged = _merging(x, node, best, len(half.evens))
    chosen = x.op("Equal", x.column(partner), x.constant(np.arange(len(half.odds)), np.int64))
    return x.cast(x.op("And", chosen, x.column(merged)), TensorProto.FLOAT)


def _merging(x: _Exporter, node: Merge, best: str, evens: int) -> str:
    """bool [batch, even]: candidates that are among the `count` most similar."""
    least = x.constant(node.minimum_similarity**2, np.float64)
    candidate = x.op(
        "And",
        x.op("Greater", best, x.constant(0.0, np.float64)),
        x.op("GreaterOrEqual", best, least),
    )
    if not node.count:
        return candidate
    mine, others = x.column(best), x.column(best, 1)
    earlier = np.tril(np.ones((evens, evens), bool), -1)
    tied = x.op("And", x.op("Equal", others, mine), x.constant(earlier[None], np.bool_))
    ahead = x.op("Or", x.op("Greater", others, mine), tied)
    ahead = x.op("And", ahead, x.column(candidate, 1))
    rank = x.total(x.cast(ahead, TensorProto.INT64), 2)
    return x.op("And", candidate, x.op("Less", rank, x.constant(node.count, np.int64)))


def _combine_mean(
    x: _Exporter, half: _Halves, value: str, pairs: str, sizes: str, total: str, odd_size: str
) -> str:
    unity = x.constant(float(MERGE_UNITY), np.float64)
    share = x.op("Div", x.op("Mul", x.double(sizes), unity), x.column(x.double(total), 1))
    share = x.op("Floor", share)
    rest = x.op("Sub", unity, x.total(share, 1))
    even, odd = half.split(x.double(value))
    moved = x.op("Einsum", share, even, equation="bac,bad->bcd")
    mixed = x.op("Add", moved, x.op("Mul", x.column(rest), odd))
    return x.cast(x.op("Floor", x.op("Div", mixed, unity)), TensorProto.FLOAT)


def _combine_max(
    x: _Exporter, half: _Halves, value: str, pairs: str, sizes: str, total: str, odd_size: str
) -> str:
    even, odd = half.split(value)
    spread = x.op("Mul", x.column(pairs), x.column(even, 2))
    return x.op("Max", odd, x.op("ReduceMax", spread, axes=[1], keepdims=0))


def _combine_keep(
    x: _Exporter, half: _Halves, value: str, pairs: str, sizes: str, total: str, odd_size: str
) -> str:
    even, odd = half.split(value)
    largest = x.op("ReduceMax", sizes, axes=[1], keepdims=0)
    winner = x.op("ArgMax", sizes, axis=1, keepdims=0)
    chosen = x.op("Equal", x.column(winner), x.constant(np.arange(len(half.evens)), np.int64))
    candidate = x.op("MatMul", x.cast(chosen, TensorProto.FLOAT), even)
    wins = x.column(x.op("Greater", largest, odd_size))
    return x.op("Where", wins, candidate, odd)


_COMBINE = {"mean": _combine_mean, "max": _combine_max, "keep": _combine_keep}


def _readout(x: _Exporter, node: Readout, arriving: Names, t: int) -> list[str]:
    """Running sum, float64 [batch, features]; weight and bias follow after the last step."""
    value = x.double(arriving["x"][0])
    if "size" in arriving:
        value = x.op("Mul", value, x.column(x.double(arriving["size"][0])))
    (edge,) = x.graph.into(node.name, "x")
    if len(x.shapes[edge.source, edge.source_port]) == 2:
        value = x.total(value, 1)
    if t:
        value = x.op("Add", value, x.values[node.name, "out", t - 1])
    return [value]


def _output(x: _Exporter, node: Output, arriving: Names, t: int) -> list[str]:
    return [arriving["in"][0]]


_EMITTERS: dict[str, Callable[..., list[str]]] = {
    "Input": _input,
    "Conv": _conv,
    "Linear": _linear,
    "LIF": _lif,
    "OrPool": _or_pool,
    "Reshape": _reshape,
    "Add": _add,
    "Attention": _attention,
    "HaltingScore": _halting_score,
    "Gate": _gate,
    "Merge": _merge,
    "Readout": _readout,
    "Output": _output,
}
