"""One executor per node kind: it keeps the node's state and advances by one or by all time steps.

`advance` takes the values on each input port, arrays [S, B, ...]: S is the number of time steps
that pass, or 1 for a value that stands still. Gates come as bool, spikes as bool, all else as
integers. What a halted token would need is not computed: its rows are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Gate,
    HaltingScore,
    Linear,
    Merge,
    Node,
    OrPool,
    Output,
    Readout,
    Reshape,
)
from hardware.engine import coincidence, counting, kernels
from hardware.engine.coincidence import attend
from hardware.engine.counting import Traffic
from hardware.engine.neurons import Neurons
from hardware.engine.plan import Plan
from hardware.engine.pooling import pool_spikes
from hardware.engine.rows import NarrowWeights, sum_rows
from hardware.engine.scatter import Scatter
from hardware.errors import EngineError
from hardware.events import SCORES_FIRST, TABLE_FIRST, AttentionOrder, NodeCounter

Array = npt.NDArray[Any]
Inputs = Mapping[str, Sequence[Array]]
Outputs = dict[str, Array]

DENSE_ABOVE = 0.6
"""Share of non-zero inputs above which a layer goes through BLAS; the result is the same."""

_ORDERS = (
    (SCORES_FIRST, coincidence.SCORES, coincidence.SCORE_READS),
    (TABLE_FIRST, coincidence.TABLE, coincidence.TABLE_READS),
)


class Executor:
    """What all executors share.

    `start(images)` sets the state to that before the first step of a batch.
    `advance(inputs, steps, counter)` lets `steps` time steps pass and returns the value of each
    output port, [steps, B, ...], or [1, B, ...] if it stands still; with a counter it counts.
    """

    def __init__(self, node: Node, plan: Plan) -> None:
        self.node_name = node.name
        self.plan = plan

    def start(self, images: int) -> None:
        """Begin a batch; executors without state have nothing to do."""

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        raise NotImplementedError

    def traffic(self, port: str, multiplied: bool = True) -> list[Traffic]:
        """How the messages of each edge into a port count."""
        sources = [edge.source for edge in self.plan.edges(self.node_name, port)]
        return [
            Traffic(self.plan.units[source], multiplied, multiplied and source in self.plan.pixels)
            for source in sources
        ]


class ConvExecutor(Executor):
    def __init__(self, node: Conv, plan: Plan) -> None:
        super().__init__(node, plan)
        largest = plan.bound_into(node.name, "in").magnitude
        self.convolve = kernels.Convolution(
            node.weight,
            node.stride,
            node.padding,
            node.dilation,
            node.groups,
            kernels.exact_dtype(node.name, node.weight, largest),
        )
        self.scatter = None
        if _can_scatter(node):
            self.scatter = Scatter(node.weight, node.padding, _largest_sum(plan, node))
        self.size = plan.shape_into(node.name, "in")[1:]

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (maps,) = inputs["in"]
        if counter:
            fan_out = self.convolve.fan_out((self.size[0], self.size[1]))
            counting.weigh(counter, maps, fan_out, steps // len(maps), *self.traffic("in"))
        out = self._product(maps.reshape(-1, *maps.shape[2:]))
        return {"out": out.reshape(*maps.shape[:2], *out.shape[1:])}

    def _product(self, maps: Array) -> Array:
        if self.scatter is None or not _sparse(maps):
            return self.convolve(maps)
        return self.scatter(_for_kernels(maps))


class LinearExecutor(Executor):
    def __init__(self, node: Linear, plan: Plan) -> None:
        super().__init__(node, plan)
        largest = plan.bound_into(node.name, "in").magnitude
        dtype = kernels.exact_dtype(node.name, node.weight, largest)
        self.matrix = np.ascontiguousarray(node.weight.T.astype(dtype))
        self.narrow = None
        if NarrowWeights.fits(node.weight):
            self.narrow = NarrowWeights(node.weight.T, _largest_sum(plan, node))

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (values,) = inputs["in"]
        gate = inputs["gate"][0] if inputs.get("gate") else None
        if gate is not None and gate.all():
            gate = None
        if counter:
            repeat = steps // len(values) if gate is None else 1
            width = self.matrix.shape[1]
            counting.weigh(counter, values, width, repeat, *self.traffic("in"), gate=gate)
        if gate is None:
            return {"out": self._product(values, None)}
        values = np.broadcast_to(values, (len(gate), *values.shape[1:]))
        return {"out": self._product(values, np.flatnonzero(gate))}

    def _product(self, values: Array, rows: Array | None) -> Array:
        """Of some rows, or of all; the others give zero."""
        flat = values.reshape(-1, values.shape[-1])
        if self.narrow is not None and _sparse(flat):
            rows = np.arange(len(flat)) if rows is None else rows
            out = sum_rows(_for_kernels(flat), rows, self.narrow)
        elif rows is None:
            out = self._dense(flat)
        else:
            out = np.zeros((len(flat), self.matrix.shape[1]), np.int32)
            out[rows] = self._dense(flat[rows])
        return out.reshape(*values.shape[:-1], self.matrix.shape[1])

    def _dense(self, rows: Array) -> Array:
        return (rows.astype(self.matrix.dtype) @ self.matrix).astype(np.int32)


class LIFExecutor(Executor):
    def __init__(self, node: LIF, plan: Plan) -> None:
        super().__init__(node, plan)
        assert node.constants is not None  # checked by the plan
        shape = plan.shapes[node.name, "out"]
        self.size = int(np.prod(shape))
        largest = plan.bound_into(node.name, "in").magnitude
        self.neurons = Neurons(node.constants, shape, largest)

    def start(self, images: int) -> None:
        self.neurons.start(images)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (activation,) = inputs["in"]
        gate = inputs["gate"][0] if inputs.get("gate") else None
        fired = self.neurons.advance(activation, gate, steps, counter is not None)
        if counter:
            counter.add("updates_gated", fired.gated)
            counter.add("updates_idle", fired.idle)
            counter.add("updates_active", steps * self.size - fired.gated - fired.idle)
            counter.add("spikes", counting.nonzero(fired.spikes, counter.seen))
        return {"out": fired.spikes}


class OrPoolExecutor(Executor):
    def __init__(self, node: OrPool, plan: Plan) -> None:
        super().__init__(node, plan)
        self.window = node.kernel, node.stride, node.padding
        _, height, width = plan.shape_into(node.name, "in")
        self.hits = kernels.window_hits((height, width), *self.window)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (maps,) = inputs["in"]
        pool = pool_spikes if maps.dtype == np.bool_ else kernels.or_pool
        out = pool(maps.reshape(-1, *maps.shape[2:]), *self.window)
        out = out.reshape(*maps.shape[:2], *out.shape[1:])
        if counter:
            repeat = steps // len(maps)
            counting.weigh(counter, maps, self.hits, repeat, *self.traffic("in", False))
            counter.add("spikes", repeat * counting.nonzero(out))
            _count_relays(counter, out, repeat)
        return {"out": out}


class ReshapeExecutor(Executor):
    def __init__(self, node: Reshape, plan: Plan) -> None:
        super().__init__(node, plan)
        self.to = node.to

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (maps,) = inputs["in"]
        if self.to == "flatten":
            return {"out": maps.reshape(*maps.shape[:2], -1)}
        grid = maps.reshape(*maps.shape[:3], -1)
        return {"out": np.ascontiguousarray(np.swapaxes(grid, -1, -2))}


class AddExecutor(Executor):
    def __init__(self, node: Add, plan: Plan) -> None:
        super().__init__(node, plan)
        self.shifts = node.shifts

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        shape = np.broadcast_shapes(*(value.shape for value in inputs["in"]))
        total = np.zeros(shape, np.int32)
        for value, shift in zip(inputs["in"], self.shifts, strict=True):
            part = value.astype(np.int32)
            part <<= shift
            total += part
        if counter:
            for value, traffic in zip(inputs["in"], self.traffic("in", False), strict=True):
                counting.weigh(counter, value, 1, steps // len(value), traffic)
            _count_relays(counter, total, steps // len(total))
        return {"out": total}


class AttentionExecutor(Executor):
    def __init__(self, node: Attention, plan: Plan) -> None:
        super().__init__(node, plan)
        self.heads = node.heads

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        queries, keys, values = (inputs[port][0] for port in ("q", "k", "v"))
        gate = inputs["gate"][0] if inputs.get("gate") else None
        out, events = attend(queries, keys, values, gate, self.heads, counter is not None)
        if counter:
            counter.add("messages", events[:, coincidence.MESSAGES])
            for name, additions, reads in _ORDERS:
                counter.add_order(name, AttentionOrder(events[:, additions], events[:, reads]))
            self._count_neurons(out, gate, steps // len(out), counter)
        return {"out": out}

    def _count_neurons(
        self, out: Array, gate: Array | None, repeat: int, counter: NodeCounter
    ) -> None:
        gated = 0
        if gate is not None:
            gated = counting.nonzero(~gate) * out.shape[-1] * repeat
        _count_relays(counter, out, repeat)
        counter.add("updates_idle", -gated)
        counter.add("updates_gated", gated)


class HaltingScoreExecutor(Executor):
    def __init__(self, node: HaltingScore, plan: Plan) -> None:
        super().__init__(node, plan)
        assert node.table is not None  # checked by the plan
        self.table = node.table.astype(np.int64)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        channel = inputs["in"][0][..., 0].astype(np.int64)
        if channel.size and (channel.max() >= len(self.table) or channel.min() < 0):
            raise EngineError(
                f"HaltingScore `{self.node_name}`: channel 0 takes values from {channel.min()} to "
                f"{channel.max()}, but its table has entries 0 to {len(self.table) - 1}"
            )
        if counter:
            repeat = steps // len(channel)
            counter.add("messages", repeat * counting.nonzero(channel))
        return {"out": self.table[channel]}


class GateExecutor(Executor):
    def __init__(self, node: Gate, plan: Plan) -> None:
        super().__init__(node, plan)
        self.threshold, self.accumulate = node.threshold, node.accumulate
        self.tokens = plan.shapes[node.name, "out"][0]

    def start(self, images: int) -> None:
        self.total = np.zeros((images, self.tokens), np.int64)
        self.before: Array | None = None

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        alive = inputs["alive"][0] if inputs.get("alive") else None
        out = np.empty((steps, *self.total.shape), np.bool_)
        for t in range(steps):
            arriving = sum(score[t % len(score)] for score in inputs["score"])
            self.total = self.total + arriving if self.accumulate else np.asarray(arriving)
            out[t] = self.total < self.threshold
            if alive is not None:
                out[t] &= alive[t % len(alive)]
        if counter:
            self._count(inputs["score"], out, alive, steps, counter)
        self.before = out[-1]
        return {"out": out}

    def _count(
        self,
        scores: Sequence[Array],
        out: Array,
        alive: Array | None,
        steps: int,
        counter: NodeCounter,
    ) -> None:
        for score in scores:
            sent = (steps // len(score)) * counting.nonzero(score)
            for name in ("messages", "sops", "acs", "unrolled_acs"):
                counter.add(name, sent)
        counter.add("updates_active", counting.nonzero(out))
        counter.add("updates_idle", counting.nonzero(~out))
        first = self.before
        if first is None:
            first = np.ones_like(out[0]) if alive is None else alive[0].astype(np.bool_)
        earlier = np.concatenate([first[None], out[:-1]])
        counter.add("gate_closings", counting.nonzero(earlier & ~out))


class MergeExecutor(Executor):
    def __init__(self, node: Merge, plan: Plan) -> None:
        super().__init__(node, plan)
        self.node = node

    def start(self, images: int) -> None:
        self.reduction: kernels.Reduction | None = None

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        stream, gate = inputs["x"][0], inputs["gate"][0]
        if self.reduction is None:
            self.reduction = self._assign(inputs, counter)
        reduction = self.reduction
        stream = np.broadcast_to(stream, (steps, *stream.shape[1:]))
        out = np.stack([reduction(now) for now in stream])
        if counter:
            self._count_combining(stream, out, counter)
        latched = (steps, *reduction.size.shape)
        return {
            "out": out,
            "gate": gate.astype(np.bool_) & reduction.alive,
            "alive": np.broadcast_to(reduction.alive, latched),
            "size": np.broadcast_to(reduction.size, latched),
        }

    def _assign(self, inputs: Inputs, counter: NodeCounter | None) -> kernels.Reduction:
        stream, gate = inputs["x"][0], inputs["gate"][0]
        compared = inputs["keys"][0] if self.node.similarity == "keys" else stream
        if self.node.assignment == "first":
            compared = compared[:1]
        eligible = gate[0].astype(np.bool_)
        alive = np.ones_like(eligible)
        if inputs.get("alive"):
            alive = inputs["alive"][0][0].astype(np.bool_)
        size = np.ones(eligible.shape, np.int64)
        if inputs.get("size"):
            size = inputs["size"][0][0].astype(np.int64)
        vectors = compared.astype(np.float64)
        even, odd = vectors[:, :, 0::2], vectors[:, :, 1::2]
        norms = (vectors**2).sum(axis=(0, 3))
        eligible = eligible & alive & (norms > 0)
        partner = kernels.matches(
            (even @ np.swapaxes(odd, -1, -2)).sum(axis=0),
            norms[:, 0::2],
            norms[:, 1::2],
            eligible[:, 0::2],
            eligible[:, 1::2],
            self.node.count,
            self.node.minimum_similarity,
        )
        if counter:
            self._count_similarities(compared, eligible, counter)
            counter.add("merges", (partner >= 0).sum(axis=1))
        return kernels.Reduction(partner, size, alive, self.node.combine)

    def _count_similarities(self, compared: Array, eligible: Array, counter: NodeCounter) -> None:
        elements = (compared != 0).sum(axis=(0, 3)) * eligible
        partners = eligible[:, 1::2].sum(axis=1)
        products = elements.sum(axis=1) + elements[:, 0::2].sum(axis=1) * partners
        counter.add("messages", elements.sum(axis=1))
        _add_macs(counter, products)

    def _count_combining(self, stream: Array, out: Array, counter: NodeCounter) -> None:
        assert self.reduction is not None
        reduction = self.reduction
        involved = np.zeros(reduction.size.shape, np.bool_)
        involved[reduction.image, reduction.giver] = True
        involved[reduction.image, reduction.taker] = True
        elements = counting.nonzero((stream != 0) & involved[..., None])
        counter.add("messages", elements)
        _add_macs(counter, elements)
        _count_relays(counter, out, 1)


class ReadoutExecutor(Executor):
    def __init__(self, node: Readout, plan: Plan) -> None:
        super().__init__(node, plan)
        self.weight = node.weight.astype(np.int64)
        self.bias = node.bias.astype(np.int64)
        self.scale = node.scale

    def start(self, images: int) -> None:
        self.total = np.zeros((images, self.weight.shape[1]), np.int64)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (stream,) = inputs["x"]
        repeat = steps // len(stream)
        weighted = stream.astype(np.int64)
        if inputs.get("size"):
            weighted = weighted * inputs["size"][0][..., None]
            repeat = steps // len(weighted)
        over = tuple(axis for axis in range(weighted.ndim - 1) if axis != 1)
        self.total += repeat * weighted.sum(axis=over)
        if counter:
            sized = bool(inputs.get("size"))
            counting.weigh(counter, weighted, 1, repeat, *self.traffic("x", sized))
            counter.add("updates_active", steps * self.weight.shape[1])
        return {}

    def finish(self, counter: NodeCounter | None) -> npt.NDArray[np.float64]:
        """Logits after the last step, float64 [B, classes]."""
        if counter:
            _add_macs(counter, (self.total != 0).sum(axis=1) * len(self.weight))
            counter.add("updates_active", len(self.weight))
        return (self.total @ self.weight.T + self.bias).astype(np.float64) / self.scale


class OutputExecutor(Executor):
    """Counts the spikes of each class where the network ends in spikes."""

    def __init__(self, node: Output, plan: Plan) -> None:
        super().__init__(node, plan)
        self.width = plan.shapes[node.name, "out"][0]

    def start(self, images: int) -> None:
        self.total = np.zeros((images, self.width), np.int64)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        for spikes in inputs.get("in", ()):
            self.total += spikes.sum(axis=0, dtype=np.int64)
        return {}


def _count_relays(counter: NodeCounter, out: Array, repeat: int) -> None:
    """Neuron updates of a node that only passes on: active where its output is not 0."""
    active = repeat * counting.nonzero(out, counter.seen)
    counter.add("updates_active", active)
    counter.add("updates_idle", repeat * len(out) * int(np.prod(out.shape[2:])) - active)


def _largest_sum(plan: Plan, node: Node) -> int:
    return plan.bounds[node.name, "out"].magnitude


def _can_scatter(node: Conv) -> bool:
    plain = node.stride == node.dilation == (1, 1) and node.groups == 1
    inside = all(p < k for p, k in zip(node.padding, node.weight.shape[2:], strict=True))
    return plain and inside and NarrowWeights.fits(node.weight)


def _sparse(values: Array) -> bool:
    return bool(np.count_nonzero(values) <= DENSE_ABOVE * values.size)


def _for_kernels(values: Array) -> Array:
    dtype = np.bool_ if values.dtype == np.bool_ else np.int32
    return np.ascontiguousarray(values, dtype=dtype)


def _add_macs(counter: NodeCounter, macs: Array) -> None:
    for name in ("sops", "macs", "unrolled_acs"):
        counter.add(name, macs)


EXECUTORS: dict[str, Callable[[Any, Plan], Executor]] = {
    "Conv": ConvExecutor,
    "Linear": LinearExecutor,
    "LIF": LIFExecutor,
    "OrPool": OrPoolExecutor,
    "Reshape": ReshapeExecutor,
    "Add": AddExecutor,
    "Attention": AttentionExecutor,
    "HaltingScore": HaltingScoreExecutor,
    "Gate": GateExecutor,
    "Merge": MergeExecutor,
    "Readout": ReadoutExecutor,
    "Output": OutputExecutor,
}
