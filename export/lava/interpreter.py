"""A part of a network in plain numpy integers, one hardware step at a time.

This is what the `blocks` grain runs inside one process model: the state of every neuron, the queue
of every delayed edge, and the recorders of everything that is probed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Edge,
    Gate,
    HaltingScore,
    Linear,
    Merge,
    Node,
    OrPool,
    Readout,
    Reshape,
    Shape,
)
from export.lava import kernels
from export.lava.partition import Part, Port
from export.lava.wire import Recorder
from export.passes.schedule import latency

Array = npt.NDArray
Arrived = dict[str, list[Array]]
"""Values that arrive at a node in one step, by port."""


class Interpreter:
    """Runs one part; `step` takes and gives values in graph layout.

    Args:
        part: what to run.
        recorders: by node name, for the nodes of this part that are probed.
    """

    def __init__(self, part: Part, recorders: dict[str, Recorder]) -> None:
        self._part = part
        self._recorders = recorders
        self._entries = {
            node.name: [(edge, _queue(edge, part)) for edge in part.graph.into(node.name)]
            for node in part.nodes
        }
        self._cells = {node.name: _cell(node, part) for node in part.nodes}
        self._late = {
            node.name: np.zeros(part.shapes[node.name, "out"], np.int32)
            for node in part.nodes
            if latency(node)
        }

    def step(self, time_step: int, arriving: list[Array]) -> list[Array]:
        """Values of the part's sinks at hardware step `time_step` (the first is 1).

        Args:
            arriving: values of the part's sources, in their order.
        """
        values: dict[Port, Array] = dict(zip(self._part.sources, arriving, strict=True))
        for node in self._part.nodes:
            arrived = self._arrived(node.name, values)
            since = time_step - 1 - self._part.graph.depth[node.name]
            results = self._cells[node.name](arrived, since)
            if node.name in self._late:
                self._late[node.name], results = results[0], (self._late[node.name],)
            values.update(
                ((node.name, port), value)
                for port, value in zip(node.outputs, results, strict=True)
            )
            if node.name in self._recorders:
                self._recorders[node.name].record(time_step, results[0])
        return [values[port] for port in self._part.sinks]

    def _arrived(self, name: str, values: dict[Port, Array]) -> Arrived:
        arrived: Arrived = {}
        for edge, queue in self._entries[name]:
            queue.append(values[edge.source, edge.source_port])
            arrived.setdefault(edge.target_port, []).append(queue.popleft())
        return arrived


def _queue(edge: Edge, part: Part) -> deque[Array]:
    empty = np.zeros(part.shapes[edge.source, edge.source_port], np.int64)
    return deque([empty] * edge.delay)


Results = tuple[Array, ...]
Cell = Callable[[Arrived, int], Results]
"""What a node does with what arrived, `since` steps after its first image's first step."""


def _cell(node: Node, part: Part) -> Cell:
    return _CELLS[node.kind](node, part)


def _optional(arrived: Arrived, port: str) -> Array | None:
    return arrived[port][0] if port in arrived else None


def _conv(node: Conv, _: Part) -> Cell:
    weight = node.weight.astype(np.float64)
    window = (node.stride, node.padding, node.dilation, node.groups)
    return lambda arrived, since: (kernels.convolve(arrived["in"][0], weight, *window),)


def _linear(node: Linear, _: Part) -> Cell:
    weight = node.weight.astype(np.float64)

    def step(arrived: Arrived, since: int) -> Results:
        values, gate = arrived["in"][0], _optional(arrived, "gate")
        if gate is not None:
            values = values * (gate[:, None] != 0)
        return (kernels.linear(values, weight),)

    return step


def _lif(node: LIF, part: Part) -> Cell:
    shape: Shape = part.shapes[node.name, "out"]
    current, voltage = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    constants = node.constants
    assert constants is not None, "validate() has seen to it"
    bias = kernels.neuron_bias(constants, len(shape))
    steps = part.graph.steps

    def step(arrived: Arrived, since: int) -> Results:
        gate = _optional(arrived, "gate")
        if since % steps == 0:
            current[...] = 0
            voltage[...] = 0
        opened = None if gate is None else gate[:, None]
        return (kernels.neurons(current, voltage, arrived["in"][0], constants, bias, opened),)

    return step


def _or_pool(node: OrPool, _: Part) -> Cell:
    window = (node.kernel, node.stride, node.padding)
    return lambda arrived, since: (kernels.or_pool(arrived["in"][0], *window),)


def _reshape(node: Reshape, _: Part) -> Cell:
    return lambda arrived, since: (kernels.reshape(arrived["in"][0], node.to),)


def _add(node: Add, _: Part) -> Cell:
    def step(arrived: Arrived, since: int) -> Results:
        total = 0
        for value, shift in zip(arrived["in"], node.shifts, strict=True):
            total = total + (value.astype(np.int64) << shift)
        return (np.asarray(total),)

    return step


def _attention(node: Attention, _: Part) -> Cell:
    def step(arrived: Arrived, since: int) -> Results:
        q, k, v = (arrived[port][0] for port in ("q", "k", "v"))
        return (kernels.attention_read(q, kernels.attention_table(k, v, node.heads)),)

    return step


def _halting_score(node: HaltingScore, _: Part) -> Cell:
    table = node.table
    assert table is not None, "validate() has seen to it"
    return lambda arrived, since: (table[arrived["in"][0][:, 0].astype(np.int64)],)


def _gate(node: Gate, part: Part) -> Cell:
    total = np.zeros(part.shapes[node.name, "out"], np.int64)
    steps = part.graph.steps

    def step(arrived: Arrived, since: int) -> Results:
        if not node.accumulate or since % steps == 0:
            total[...] = 0
        for score in arrived["score"]:
            total[...] += score
        opened = total < node.threshold
        alive = _optional(arrived, "alive")
        return ((opened if alive is None else opened & (alive != 0)).astype(np.uint8),)

    return step


def _merge(node: Merge, part: Part) -> Cell:
    tokens = part.shapes[node.name, "size"][0]
    steps = part.graph.steps
    ones = np.ones(tokens, np.int64)
    latched: dict[str, Any] = {"matching": kernels.Matching(-ones), "size": ones}

    def step(arrived: Arrived, since: int) -> Results:
        stream, gate = arrived["x"][0], arrived["gate"][0]
        alive, size = _optional(arrived, "alive"), _optional(arrived, "size")
        alive = ones if alive is None else alive
        if since >= 0 and since % steps == 0:
            features = arrived["keys"][0] if node.similarity == "keys" else stream
            eligible = (gate != 0) & (alive != 0)
            latched["matching"] = kernels.match(
                features, eligible, node.count, node.minimum_similarity
            )
            latched["size"] = ones if size is None else size.astype(np.int64)
        matching, size = latched["matching"], latched["size"]
        return (
            kernels.combine(matching, stream, size, node.combine),
            gate * matching.stays,
            alive * matching.stays,
            kernels.merged_sizes(matching, size),
        )

    return step


def _readout(node: Readout, part: Part) -> Cell:
    weight, bias = node.weight.astype(np.int64), node.bias.astype(np.int64)
    total = np.zeros(weight.shape[1], np.int64)
    steps = part.graph.steps

    def step(arrived: Arrived, since: int) -> Results:
        values, size = arrived["x"][0].astype(np.int64), _optional(arrived, "size")
        if size is not None:
            values = values * size[:, None].astype(np.int64)
        if since % steps == 0:
            total[...] = 0
        total[...] += values.reshape(-1, total.size).sum(axis=0)
        last = since % steps == steps - 1
        return (weight @ total + bias if last else np.zeros_like(bias),)

    return step


_CELLS: dict[str, Callable[[Any, Part], Cell]] = {
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
}
