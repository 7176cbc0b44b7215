"""One executor per node kind: it keeps the node's state and advances by one or by all time steps.

`advance` takes the values on each input port, arrays [S, B, ...]: S is the number of time steps
that pass, or 1 for a value that stands still. Gates come as bool, spikes as bool, all else as
integers. What a halted token would need is not computed: its rows are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
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
from hardware.engine.addition import add_rows, integers_for, sum_rows
from hardware.engine.coincidence import attend
from hardware.engine.counting import Traffic
from hardware.engine.dense import DenseSynapses, as_bytes, can_be_bytes, dense_is_faster
from hardware.engine.gathering import has_dot_products
from hardware.engine.lists import EventLists
from hardware.engine.neurons import Neurons
from hardware.engine.plan import Plan
from hardware.engine.pooling import pool_spikes
from hardware.engine.rows import as_rows, from_rows, line_width
from hardware.engine.shared import Shared
from hardware.engine.synapses import (
    FiringResult,
    SpikingSynapses,
    Synapses,
    can_fuse,
    fits_eight_bits,
    map_window,
    token_window,
)
from hardware.engine.tally import of_spikes
from hardware.errors import EngineError
from hardware.events import SCORES_FIRST, TABLE_FIRST, AttentionOrder, NodeCounter, PerImage

Array = npt.NDArray[Any]
Inputs = Mapping[str, Sequence[Array]]
Outputs = dict[str, Array]

_ORDERS = (
    (SCORES_FIRST, coincidence.SCORES, coincidence.SCORE_READS),
    (TABLE_FIRST, coincidence.TABLE, coincidence.TABLE_READS),
)


class Executor:
    """What all executors share.

    `begin()` comes before the first batch of a run; `start(images, shared)` sets the state to that
    before the first step of a batch.
    `advance(inputs, steps, counter)` lets `steps` time steps pass and returns the value of each
    output port, [steps, B, ...], or [1, B, ...] if it stands still; with a counter it counts.
    """

    shared: Shared

    def __init__(self, node: Node, plan: Plan) -> None:
        self.node_name = node.name
        self.plan = plan

    def begin(self) -> None:
        """Begin a run; executors that keep an account over its batches open a new one."""

    def start(self, images: int, shared: Shared) -> None:
        """Begin a batch; `images` matters to executors that have state."""
        self.shared = shared

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        raise NotImplementedError

    def release(self) -> None:
        """Free what can be made again; called when no batch is to come."""

    def traffic(self, port: str, multiplied: bool = True) -> list[Traffic]:
        """How the messages of each edge into a port count."""
        sources = [edge.source for edge in self.plan.edges(self.node_name, port)]
        return [
            Traffic(self.plan.units[source], multiplied, multiplied and source in self.plan.pixels)
            for source in sources
        ]

    def count_relays(self, counter: NodeCounter, out: Array, repeat: int) -> None:
        """Neuron updates of a node that only passes on: active where its output is not 0."""
        active = repeat * counting.messages(self.shared, out)
        counter.add("updates_active", active)
        counter.add("updates_idle", repeat * len(out) * int(np.prod(out.shape[2:])) - active)


class SynapseExecutor(Executor):
    """A Conv or Linear whose sums are wanted themselves."""

    def __init__(self, node: Conv | Linear, plan: Plan) -> None:
        super().__init__(node, plan)
        self.shape = plan.shape_into(node.name, "in")
        self.out_shape = plan.shapes[node.name, "out"]
        self.bound = plan.bound_into(node.name, "in")
        self.shift = listed_shift(node, plan)
        self.fan_out = fan_out(node, self.shape)
        self.synapses = pack(node, plan) if can_pack(node) else None
        self.dense = None if self.synapses else _dense(node, self.bound.magnitude)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (values,) = inputs["in"]
        gate = _some_closed(inputs)
        if counter:
            self.count(values, gate, steps, counter)
        if self.synapses:
            sums = self.synapses.sums(self.lists(values, gate), gate)
            return {"out": from_rows(sums, self.out_shape)}
        return {"out": self._multiplied(values, gate)}

    def release(self) -> None:
        if self.synapses:
            self.synapses.drop_packed()

    def lists(self, values: Array, gate: Array | None) -> EventLists:
        return self.shared.lists(values, line_width(self.shape), gate, self.bound, self.shift)

    def count(self, values: Array, gate: Array | None, steps: int, counter: NodeCounter) -> None:
        """Count what arrives."""
        repeat = steps // len(values) if gate is None else steps // max(len(gate), len(values))
        (traffic,) = self.traffic("in")
        counting.weigh(counter, self.shared, values, self.fan_out, repeat, traffic, gate=gate)

    def _multiplied(self, values: Array, gate: Array | None) -> Array:
        assert self.dense is not None
        if gate is not None:
            values = np.where(gate[..., None], values, 0)
        out = self.dense(values.reshape(-1, *values.shape[2:]))
        return out.reshape(*values.shape[:2], *self.out_shape)


class SpikingSynapseExecutor(SynapseExecutor):
    """A Conv or Linear together with the LIF neurons behind it, from the first step to the last."""

    def __init__(self, node: Conv | Linear, neurons: LIF, plan: Plan) -> None:
        super().__init__(node, plan)
        assert self.synapses is not None  # see `fusible`
        assert neurons.constants is not None
        self.size = int(np.prod(self.out_shape))
        self.spiking = SpikingSynapses(self.synapses, neurons.constants)
        self.can_be_dense = has_dot_products() and can_be_bytes(self.bound, self.shift)
        self.begin()

    def begin(self) -> None:
        self.wraps, self.saturations = 0, 0  # a current that can wrap is not fusible

    @cached_property
    def dense_synapses(self) -> DenseSynapses:
        return DenseSynapses(self.spiking)

    def release(self) -> None:
        super().release()
        self.__dict__.pop("dense_synapses", None)

    def fire(self, values: Array, gate: Array | None, steps: int) -> FiringResult:
        """Event-driven or dense, whichever is faster at the density of the first images."""
        few = values[:, :2]
        density = np.count_nonzero(few) / few.size
        if self.can_be_dense and dense_is_faster(self.spiking.synapses, density):
            synapses = self.spiking.synapses
            arriving = self.shared.padded(
                values,
                (synapses.window.padding_y, synapses.window.padding_x),
                lambda: as_bytes(as_rows(values), synapses, self.shift),
            )
            return self.dense_synapses.fire(arriving, values.shape[1], gate, steps)
        return self.spiking.fire(self.lists(values, gate), gate, steps)

    def run(
        self,
        inputs: Inputs,
        steps: int,
        counter: NodeCounter | None,
        neuron_counter: NodeCounter | None,
    ) -> Outputs:
        """As `advance`, with a counter for each of the two nodes."""
        (values,) = inputs["in"]
        gate = _some_closed(inputs)
        fired = self.fire(values, gate, steps)
        spikes = from_rows(fired.spikes, self.out_shape)
        self.saturations += fired.saturations
        self.shared.keep_counts(spikes, of_spikes(fired.found))
        if counter and neuron_counter:
            self.count(values, gate, steps, counter)
            gated: PerImage | int = 0
            if gate is not None:
                gated = (
                    counting.nonzero(~gate) * self.spiking.synapses.outputs * (steps // len(gate))
                )
            neuron_counter.add("updates_gated", gated)
            neuron_counter.add("updates_idle", fired.idle)
            neuron_counter.add("updates_active", steps * self.size - gated - fired.idle)
            neuron_counter.add("spikes", counting.messages(self.shared, spikes))
        return {"out": spikes}


class LIFExecutor(Executor):
    def __init__(self, node: LIF, plan: Plan) -> None:
        super().__init__(node, plan)
        assert node.constants is not None  # checked by the plan
        shape = plan.shapes[node.name, "out"]
        self.size = int(np.prod(shape))
        largest = plan.bound_into(node.name, "in").magnitude
        self.neurons = Neurons(node.constants, shape, largest)

    def begin(self) -> None:
        self.neurons.current_wraps = self.neurons.voltage_saturations = 0

    @property
    def wraps(self) -> int:
        return self.neurons.current_wraps

    @property
    def saturations(self) -> int:
        return self.neurons.voltage_saturations

    def start(self, images: int, shared: Shared) -> None:
        super().start(images, shared)
        self.neurons.start(images)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (activation,) = inputs["in"]
        gate = inputs["gate"][0] if inputs.get("gate") else None
        fired = self.neurons.advance(activation, gate, steps, counter is not None)
        if counter:
            counter.add("updates_gated", fired.gated)
            counter.add("updates_idle", fired.idle)
            counter.add("updates_active", steps * self.size - fired.gated - fired.idle)
            counter.add("spikes", counting.messages(self.shared, fired.spikes))
        return {"out": fired.spikes}


class OrPoolExecutor(Executor):
    def __init__(self, node: OrPool, plan: Plan) -> None:
        super().__init__(node, plan)
        self.window = node.kernel, node.stride, node.padding
        _, height, width = plan.shape_into(node.name, "in")
        self.hits = kernels.window_hits((height, width), *self.window).reshape(-1)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (maps,) = inputs["in"]
        out = self._spikes(maps) if maps.dtype == np.bool_ else self._largest(maps)
        if counter:
            repeat = steps // len(maps)
            (traffic,) = self.traffic("in", False)
            counting.weigh(counter, self.shared, maps, self.hits, repeat, traffic)
            counter.add("spikes", repeat * counting.messages(self.shared, out))
            self.count_relays(counter, out, repeat)
        return {"out": out}

    def _spikes(self, maps: Array) -> Array:
        last = np.ascontiguousarray(np.moveaxis(maps, 2, -1))
        out = pool_spikes(last.reshape(-1, *last.shape[2:]), *self.window)
        return np.moveaxis(out.reshape(*last.shape[:2], *out.shape[1:]), -1, 2)

    def _largest(self, maps: Array) -> Array:
        out = kernels.or_pool(maps.reshape(-1, *maps.shape[2:]), *self.window)
        return out.reshape(*maps.shape[:2], *out.shape[1:])


class ReshapeExecutor(Executor):
    def __init__(self, node: Reshape, plan: Plan) -> None:
        super().__init__(node, plan)
        self.to = node.to

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (maps,) = inputs["in"]
        if self.to == "flatten":
            return {"out": maps.reshape(*maps.shape[:2], -1)}
        return {"out": as_rows(maps)}


class AddExecutor(Executor):
    def __init__(self, node: Add, plan: Plan) -> None:
        super().__init__(node, plan)
        self.shifts = node.shifts
        self.shape = plan.shapes[node.name, "out"]
        self.dtype = integers_for(plan.bounds[node.name, "out"])

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        addends = [as_rows(value) for value in inputs["in"]]
        total = from_rows(add_rows(addends, self.shifts, self.dtype), self.shape)
        if counter:
            self.shared.counts(total, self.plan.units[self.node_name])  # what all its readers want
            for value, traffic in zip(inputs["in"], self.traffic("in", False), strict=True):
                counting.weigh(counter, self.shared, value, 1, steps // len(value), traffic)
            self.count_relays(counter, total, steps // len(total))
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
        self.count_relays(counter, out, repeat)
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

    def start(self, images: int, shared: Shared) -> None:
        super().start(images, shared)
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

    def start(self, images: int, shared: Shared) -> None:
        super().start(images, shared)
        self.reduction: kernels.Reduction | None = None

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        stream, gate = inputs["x"][0], inputs["gate"][0]
        if self.reduction is None:
            self.reduction = self._assign(inputs, counter)
        reduction = self.reduction
        stream = np.broadcast_to(stream, (steps, *stream.shape[1:]))
        out = reduction(stream)
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
        elements = self.shared.messages(compared).sum(axis=0) * eligible
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
        elements = (self.shared.messages(stream) * involved).sum(axis=(0, 2))
        counter.add("messages", elements)
        _add_macs(counter, elements)
        self.count_relays(counter, out, 1)


class ReadoutExecutor(Executor):
    def __init__(self, node: Readout, plan: Plan) -> None:
        super().__init__(node, plan)
        self.weight = node.weight.astype(np.int64)
        self.bias = node.bias.astype(np.int64)
        self.scale = node.scale

    def start(self, images: int, shared: Shared) -> None:
        super().start(images, shared)
        self.total = np.zeros((images, self.weight.shape[1]), np.int64)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        (stream,) = inputs["x"]
        sized = bool(inputs.get("size"))
        if sized:
            stream = stream.astype(np.int32) * inputs["size"][0][..., None].astype(np.int32)
        repeat = steps // len(stream)
        self.total += repeat * sum_rows(as_rows(stream))
        if counter:
            (traffic,) = self.traffic("x", sized)
            counting.weigh(counter, self.shared, stream, 1, repeat, traffic)
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

    def start(self, images: int, shared: Shared) -> None:
        super().start(images, shared)
        self.total = np.zeros((images, self.width), np.int64)

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        for spikes in inputs.get("in", ()):
            self.total += spikes.sum(axis=0, dtype=np.int64)
        return {}


def can_pack(node: Conv | Linear) -> bool:
    """Whether the event-driven kernel takes this layer; what it does not, BLAS multiplies."""
    if not fits_eight_bits(node.weight):
        return False
    if isinstance(node, Linear):
        return True
    inside = all(p < k for p, k in zip(node.padding, node.weight.shape[2:], strict=True))
    return inside and node.groups == 1 and node.dilation == (1, 1)


def pack(node: Conv | Linear, plan: Plan) -> Synapses:
    """Weights of a layer for the event-driven kernel."""
    shape = plan.shape_into(node.name, "in")
    if isinstance(node, Conv):
        window = map_window(shape, node.weight, node.stride, node.padding)
    else:
        window = token_window(int(np.prod(shape[:-1], dtype=int)), shape[-1])
    largest = plan.bounds[node.name, "out"].magnitude
    return Synapses(node.weight, window, largest, listed_shift(node, plan))


def listed_shift(node: Conv | Linear, plan: Plan) -> int:
    """Logarithm of what divides all that arrives at a layer."""
    return plan.multiples[plan.edges(node.name, "in")[0].source].bit_length() - 1


def fusible(plan: Plan, node: Node) -> LIF | None:
    """The LIF node that can fire as soon as this node's sums are there, if there is one."""
    users = plan.users(node.name)
    if not isinstance(node, Conv | Linear) or len(users) != 1 or users[0].lag:
        return None
    neurons = plan.graph[users[0].target]
    if not isinstance(neurons, LIF) or neurons.constants is None or not can_pack(node):
        return None
    gates = [
        [(e.source, e.source_port) for e in plan.edges(n.name, "gate")] for n in (node, neurons)
    ]
    alone = len(plan.edges(neurons.name, "in")) == 1
    activation = plan.bounds[node.name, "out"]
    if alone and gates[0] == gates[1] and can_fuse(neurons.constants, activation):
        return neurons
    return None


def _sources(plan: Plan, node: str) -> list[tuple[str, str]]:
    """Output ports that a node's gate comes from."""
    return [(edge.source, edge.source_port) for edge in plan.edges(node, "gate")]


def fan_out(node: Conv | Linear, shape: tuple[int, ...]) -> Array | int:
    """Synapses that a message of each row meets."""
    if isinstance(node, Linear):
        return len(node.weight)
    size = node.weight.shape[2], node.weight.shape[3]
    hits = kernels.window_hits((shape[1], shape[2]), size, node.stride, node.padding, node.dilation)
    return hits.reshape(-1) * (len(node.weight) // node.groups)


def _dense(node: Conv | Linear, largest: int) -> Callable[[Array], Array]:
    """Exact product through BLAS, of maps [M, C, H, W] or of rows [M, ..., D]."""
    dtype = kernels.exact_dtype(node.name, node.weight, largest)
    if isinstance(node, Conv):
        return kernels.Convolution(
            node.weight, node.stride, node.padding, node.dilation, node.groups, dtype
        )
    matrix = np.ascontiguousarray(node.weight.T.astype(dtype))
    return lambda values: (values.astype(dtype) @ matrix).astype(np.int32)


def _some_closed(inputs: Inputs) -> Array | None:
    """The gate, if any token's is closed."""
    gate = inputs["gate"][0] if inputs.get("gate") else None
    return None if gate is None or gate.all() else gate


def _add_macs(counter: NodeCounter, macs: Array) -> None:
    for name in ("sops", "macs", "unrolled_acs"):
        counter.add(name, macs)


EXECUTORS: dict[str, Callable[[Any, Plan], Executor]] = {
    "Conv": SynapseExecutor,
    "Linear": SynapseExecutor,
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
