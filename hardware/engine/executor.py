"""What the executors of all kinds of nodes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import (
    Node,
)
from hardware.engine import counting
from hardware.engine.counting import Traffic
from hardware.engine.plan import Plan
from hardware.engine.shared import Shared
from hardware.events import NodeCounter, PerImage

Array = npt.NDArray[Any]
Inputs = Mapping[str, Sequence[Array]]
Outputs = dict[str, Array]


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

    def gated(self, gate: Array | None, channels: int, steps: int) -> PerImage | int:
        """Neuron updates of `steps` steps that a gate [S, B, N] prevents."""
        if gate is None:
            return 0
        return self.shared.closed(gate) * channels * (steps // len(gate))

    def count_fired(
        self,
        counter: NodeCounter,
        spikes: Array,
        gate: Array | None,
        channels: int,
        idle: PerImage,
    ) -> None:
        """Count the updates and spikes [T, B, ...] of neurons that ran with what is before them."""
        gated = self.gated(gate, channels, len(spikes))
        counter.add("updates_gated", gated)
        counter.add("updates_idle", idle)
        counter.add("updates_active", len(spikes) * int(np.prod(spikes.shape[2:])) - gated - idle)
        counter.add("spikes", counting.messages(self.shared, spikes))

    def count_relays(self, counter: NodeCounter, out: Array, repeat: int) -> None:
        """Neuron updates of a node that only passes on: active where its output is not 0."""
        active = repeat * counting.messages(self.shared, out)
        counter.add("updates_active", active)
        counter.add("updates_idle", repeat * len(out) * int(np.prod(out.shape[2:])) - active)
