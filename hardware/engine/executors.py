"""One executor per node kind: it keeps the node's state and advances by one or by all time steps.

`advance` takes the values on each input port, arrays [S, B, ...]: S is the number of time steps
that pass, or 1 for a value that stands still. Gates come as bool, spikes as bool, all else as
integers. What a halted token would need is not computed: its rows are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import ACTIVATION_SHIFT
from export.graph import (
    LIF,
    Add,
    Attention,
    Gate,
    HaltingScore,
    Merge,
    OrPool,
    Output,
    Readout,
    Reshape,
)
from hardware.engine import coincidence, counting, kernels
from hardware.engine.addition import add_rows, integers_for, join_rows, sum_rows, sum_sized_rows
from hardware.engine.coincidence import attend, attend_and_fire, can_fire
from hardware.engine.executor import Executor, Inputs, Outputs
from hardware.engine.layers import SynapseExecutor
from hardware.engine.merging import Matches, Reduction, match_tokens
from hardware.engine.neurons import HALVING, Neurons
from hardware.engine.plan import Plan
from hardware.engine.pooling import pool_spikes
from hardware.engine.rows import as_rows, from_rows
from hardware.engine.shared import Shared
from hardware.engine.synapses import can_fuse
from hardware.engine.tally import RowCounts, of_spikes, sent_rows
from hardware.errors import EngineError
from hardware.events import SCORES_FIRST, TABLE_FIRST, AttentionOrder, NodeCounter

Array = npt.NDArray[Any]

_ORDERS = (
    (SCORES_FIRST, coincidence.SCORES, coincidence.SCORE_READS),
    (TABLE_FIRST, coincidence.TABLE, coincidence.TABLE_READS),
)


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
        pooled, found = pool_spikes(last.reshape(-1, *last.shape[2:]), *self.window)
        out = np.moveaxis(pooled.reshape(*last.shape[:2], *pooled.shape[1:]), -1, 2)
        self.shared.keep_counts(out, of_spikes(found.reshape(*last.shape[:2], -1)))
        return out

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
        out = as_rows(maps)
        if counter:
            self.shared.same_rows(maps, out)
        return {"out": out}


class HoldExecutor(Executor):
    """A relay per element: takes a message at the first step and sends it at every step."""

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        first = inputs["in"][0][:1]
        if counter:
            arrived = counting.messages(self.shared, first)
            for name in ("messages", "sops", "acs", "unrolled_acs"):
                counter.add(name, arrived)
            self.count_relays(counter, first, self.plan.graph.steps)
        return {"out": first if steps == 1 else np.repeat(first, steps, axis=0)}


class AddExecutor(Executor):
    def __init__(self, node: Add, plan: Plan) -> None:
        super().__init__(node, plan)
        self.shifts = node.shifts
        self.shape = plan.shapes[node.name, "out"]
        self.dtype = integers_for(plan.bounds[node.name, "out"])
        self.unit = plan.units[node.name]
        self.overwritten: int | None = None
        """Place among the addends of one that nobody reads after this node."""

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        addends = inputs["in"]
        if counter:
            for value, traffic in zip(addends, self.traffic("in", False), strict=True):
                counting.weigh(counter, self.shared, value, 1, steps // len(value), traffic)
        if self._can_join(addends):
            sums, counts = self._join(addends, counter is not None)
        else:
            rows = [as_rows(value) for value in addends]
            sums, counts = add_rows(rows, self.shifts, self.dtype, self.unit if counter else None)
        total = from_rows(sums, self.shape)
        if counter and counts is not None:
            self.shared.keep_counts(total, counts, self.unit)
            self.count_relays(counter, total, steps // len(total))
        return {"out": total}

    def _can_join(self, addends: Sequence[Array]) -> bool:
        """Whether spikes can be added where the stream is."""
        if self.overwritten is None or len(addends) != 2 or self.shifts[self.overwritten]:
            return False
        stream, spikes = addends[self.overwritten], addends[1 - self.overwritten]
        return (
            stream.ndim == 4
            and stream.shape == spikes.shape
            and stream.dtype == self.dtype
            and spikes.dtype == np.bool_
        )

    def _join(self, addends: Sequence[Array], count: bool) -> tuple[Array, RowCounts | None]:
        assert self.overwritten is not None
        stream, spikes = addends[self.overwritten], addends[1 - self.overwritten]
        counts = self.shared.counts(stream, self.unit) if count else None
        found = self.shared.messages(spikes)
        sums = stream.view()  # another array, so that what was known of the old values is forgotten
        shift = self.shifts[1 - self.overwritten]
        return sums, join_rows(sums, spikes, shift, found, counts, self.unit)


class AttentionExecutor(Executor):
    def __init__(self, node: Attention, plan: Plan) -> None:
        super().__init__(node, plan)
        self.heads = node.heads

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        queries, keys, values = (inputs[port][0] for port in ("q", "k", "v"))
        gate = inputs["gate"][0] if inputs.get("gate") else None
        out, events, messages = attend(queries, keys, values, gate, self.heads, counter is not None)
        if counter:
            self.count(events, messages, out.shape, gate, counter)
        return {"out": out}

    def count(
        self,
        events: Array,
        filled: Array,
        shape: tuple[int, ...],
        gate: Array | None,
        counter: NodeCounter,
    ) -> None:
        """Count the events of `Attended`; the values are of `shape` [T, B, N, D]."""
        counter.add("messages", events[:, coincidence.MESSAGES])
        for name, additions, reads in _ORDERS:
            counter.add_order(name, AttentionOrder(events[:, additions], events[:, reads]))
        steps, _, tokens, channels = shape
        gated = self.gated(gate, channels, steps)
        active = filled.sum(axis=(0, 2), dtype=np.int64)
        counter.add("updates_active", active)
        counter.add("updates_idle", steps * tokens * channels - active - gated)
        counter.add("updates_gated", gated)


class SpikingAttentionExecutor(AttentionExecutor):
    """Attention together with the LIF neurons behind it, from the first step to the last."""

    def __init__(self, node: Attention, neurons: LIF, plan: Plan) -> None:
        super().__init__(node, plan)
        assert neurons.constants is not None  # see `fusible_attention`
        constants = neurons.constants
        channels = plan.shapes[node.name, "out"][1]
        self.bias = np.ascontiguousarray(np.broadcast_to(constants.bias, channels), np.int32)
        self.halving = int(constants.dv == HALVING)
        self.threshold = constants.threshold << ACTIVATION_SHIFT
        self.begin()

    def begin(self) -> None:
        self.wraps, self.saturations = 0, 0  # without current memory nothing wraps

    def run(
        self,
        inputs: Inputs,
        steps: int,
        counter: NodeCounter | None,
        neuron_counter: NodeCounter | None,
    ) -> Outputs:
        """As `advance`, with a counter for each of the two nodes."""
        queries, keys, values = (
            np.broadcast_to(inputs[p][0], (steps, *inputs[p][0].shape[1:])) for p in ("q", "k", "v")
        )
        gate = inputs["gate"][0] if inputs.get("gate") else None
        fired = attend_and_fire(
            queries, keys, values, gate, self.heads, counter is not None,
            self.bias, self.halving, self.threshold,
        )  # fmt: skip
        self.saturations += fired.saturations
        self.shared.keep_counts(fired.spikes, of_spikes(fired.found))
        if counter and neuron_counter:
            shape = fired.spikes.shape
            self.count(fired.events, fired.messages, shape, gate, counter)
            self.count_fired(neuron_counter, fired.spikes, gate, shape[3], fired.idle)
        return {"out": fired.spikes}


def fusible_attention(plan: Plan, node: Attention) -> LIF | None:
    """The LIF node that can fire as soon as this node's sums are there, if there is one."""
    users = plan.users(node.name)
    if len(users) != 1 or users[0].lag:
        return None
    neurons = plan.graph[users[0].target]
    if not isinstance(neurons, LIF) or neurons.constants is None:
        return None
    own = plan.attention_gates.get(node.name)
    gates = [(edge.source, edge.source_port) for edge in plan.edges(neurons.name, "gate")]
    alone = len(plan.edges(neurons.name, "in")) == 1
    tokens, channels = plan.shapes[node.name, "out"]
    fits = can_fire(tokens, channels, node.heads)
    current_fits = can_fuse(neurons.constants, plan.bounds[node.name, "out"])
    if alone and gates == ([own] if own else []) and fits and current_fits:
        return neurons
    return None


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
        self.largest = plan.bound_into(node.name, self.compared_port).magnitude

    @property
    def compared_port(self) -> str:
        return "keys" if self.node.similarity == "keys" else "x"

    def start(self, images: int, shared: Shared) -> None:
        super().start(images, shared)
        self.reduction: Reduction | None = None

    def advance(self, inputs: Inputs, steps: int, counter: NodeCounter | None) -> Outputs:
        stream, gate = inputs["x"][0], inputs["gate"][0]
        if self.reduction is None:
            self.reduction = self._assign(inputs, counter)
        reduction = self.reduction
        out = reduction(stream)
        if counter:
            self._count_combining(stream, out, steps // len(stream), counter)
        latched = (steps, *reduction.size.shape)
        return {
            "out": out,
            "gate": gate.astype(np.bool_) & reduction.alive,
            "alive": np.broadcast_to(reduction.alive, latched),
            "size": np.broadcast_to(reduction.size, latched),
        }

    def _assign(self, inputs: Inputs, counter: NodeCounter | None) -> Reduction:
        eligible = inputs["gate"][0][0].astype(np.bool_)
        alive = np.ones_like(eligible)
        if inputs.get("alive"):
            alive = inputs["alive"][0][0].astype(np.bool_)
        size = np.ones(eligible.shape, np.int64)
        if inputs.get("size"):
            size = inputs["size"][0][0].astype(np.int64)
        values = inputs[self.compared_port][0]
        seen = values[:1] if self.node.assignment == "first" else values
        found = match_tokens(
            seen, eligible & alive, self.node.count, self.node.minimum_similarity, self.largest
        )
        if counter:
            self._count_similarities(values, len(seen), found, counter)
        return Reduction(found.partner, size, alive, self.node.combine)

    def _count_similarities(
        self, values: Array, steps: int, found: Matches, counter: NodeCounter
    ) -> None:
        """Of the first `steps` of the values that are compared."""
        elements = self.shared.messages(values)[:steps].sum(axis=0) * found.compared
        partners = found.compared[:, 1::2].sum(axis=1)
        products = elements.sum(axis=1) + elements[:, 0::2].sum(axis=1) * partners
        counter.add("messages", elements.sum(axis=1))
        _add_macs(counter, products)
        counter.add("merges", (found.partner >= 0).sum(axis=1))

    def _count_combining(
        self, stream: Array, out: Array, repeat: int, counter: NodeCounter
    ) -> None:
        assert self.reduction is not None
        self.shared.counts(out, self.plan.units[self.node_name])  # what its readers want
        elements = self.shared.messages_over_time(stream) * self.reduction.involved
        sent = repeat * elements.sum(axis=1, dtype=np.int64)
        counter.add("messages", sent)
        _add_macs(counter, sent)
        self.count_relays(counter, out, repeat)


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
        repeat = steps // len(stream)
        (traffic,) = self.traffic("x", sized)
        if sized:
            total, counts = sum_sized_rows(as_rows(stream), inputs["size"][0], traffic.unit)
        else:
            total = sum_rows(as_rows(stream))
            counts = self.shared.counts(stream, traffic.unit) if counter else None
        self.total += repeat * total
        if counter and counts is not None:
            counting.weigh_sent(counter, sent_rows(counts, None), repeat, traffic)
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


def _add_macs(counter: NodeCounter, macs: Array) -> None:
    for name in ("sops", "macs", "unrolled_acs"):
        counter.add(name, macs)


EXECUTORS: dict[str, Callable[[Any, Plan], Executor]] = {
    "Conv": SynapseExecutor,
    "Linear": SynapseExecutor,
    "LIF": LIFExecutor,
    "OrPool": OrPoolExecutor,
    "Reshape": ReshapeExecutor,
    "Hold": HoldExecutor,
    "Add": AddExecutor,
    "Attention": AttentionExecutor,
    "HaltingScore": HaltingScoreExecutor,
    "Gate": GateExecutor,
    "Merge": MergeExecutor,
    "Readout": ReadoutExecutor,
    "Output": OutputExecutor,
}
