"""Executors of convolutions and linear layers, alone or together with the neurons behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import (
    LIF,
    Conv,
    Linear,
    Node,
)
from hardware.engine import counting, kernels
from hardware.engine.dense import DenseSynapses, as_bytes, can_be_bytes, dense_is_faster
from hardware.engine.executor import Executor, Inputs, Outputs
from hardware.engine.lists import EventLists
from hardware.engine.plan import Plan
from hardware.engine.products import has_dot_products
from hardware.engine.rows import as_rows, from_rows, line_width
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
from hardware.events import NodeCounter

Array = npt.NDArray[Any]


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
            outputs = self.spiking.synapses.outputs
            self.count_fired(neuron_counter, spikes, gate, outputs, fired.idle)
        return {"out": spikes}


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
