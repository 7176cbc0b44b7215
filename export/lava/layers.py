"""A part of a network as one Lava process per node: standard processes wherever Lava has them.

Wiring rules, each against a trap of Lava 0.10.0: in-ports always sum, so every sum has an in-port
of its own; the same source twice into one port is refused by Lava, so the second goes through a
relay; reshaped (virtual) ports go wrong at in-ports of hierarchical processes, so layouts change in
relays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lava.magma.core.process.process import AbstractProcess
from lava.proc.conv.process import Conv as LavaConv
from lava.proc.dense.process import Dense as LavaDense
from lava.proc.lif.process import LIFReset
from lava.utils.weightutils import SignMode

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
)
from export.lava.kernels import WRAPS_ONCE
from export.lava.partition import Part, Port
from export.lava.processes.attention.process import SpikingAttention
from export.lava.processes.io.process import Probe
from export.lava.processes.io.process import Readout as ReadoutProcess
from export.lava.processes.neuron.process import GatedLIF
from export.lava.processes.neuron.process import OrPool as OrPoolProcess
from export.lava.processes.relay.process import Relay
from export.lava.processes.token.process import HaltingScore as HaltingScoreProcess
from export.lava.processes.token.process import TokenGate, TokenMerge
from export.lava.wire import Recorder, wire_shape
from export.ranges import maxima

LavaPort = Any
"""An InPort or OutPort; Lava gives them no useful common type."""


def build_layers(
    segment: AbstractProcess, part: Part, recorders: dict[str, Recorder]
) -> list[AbstractProcess]:
    """Make and connect the processes of one segment.

    Args:
        segment: the hierarchical process whose ports `in<i>` and `out<i>` are connected.
        part: what it contains.
        recorders: by node name, for everything that is probed.
    """
    wiring = _Wiring(part, maxima(part.graph))
    for index, source in enumerate(part.sources):
        wiring.providers[source] = getattr(segment, f"in{index}")
    for node in part.nodes:
        _BUILDERS[node.kind](node, wiring)
    for index, sink in enumerate(part.sinks):
        wiring.providers[sink].connect(getattr(segment, f"out{index}"))
    wiring.probe(recorders)
    return wiring.processes


@dataclass
class _Wiring:
    """Processes made so far, and the Lava port that provides each value of the graph."""

    part: Part
    maxima: dict[Port, int]
    processes: list[AbstractProcess] = field(default_factory=list)
    providers: dict[Port, LavaPort] = field(default_factory=dict)
    _relays: dict[tuple[Any, ...], LavaPort] = field(default_factory=dict)
    _connected: set[tuple[int, int]] = field(default_factory=set)

    def place(self, process: Any, *outputs: tuple[Port, LavaPort]) -> Any:
        self.processes.append(process)
        self.providers.update(outputs)
        return process

    def into(self, node: Node, port: str) -> tuple[Edge, ...]:
        return self.part.graph.into(node.name, port)

    def has(self, node: Node, port: str) -> bool:
        return bool(self.into(node, port))

    def shape(self, edge: Edge) -> tuple[int, ...]:
        return self.part.shapes[edge.source, edge.source_port]

    def connect(self, node: Node, port: str, target: LavaPort, shifts: Any = None) -> None:
        """Connect every edge into `port` of a node to one Lava port, which sums them."""
        for index, edge in enumerate(self.into(node, port)):
            self.join(self.delivered(edge, shifts[index] if shifts else 0), target, edge)

    def join(self, provider: LavaPort, target: LavaPort, edge: Edge) -> None:
        """Connect two ports; a second connection of the same pair goes through a relay."""
        if (id(provider), id(target)) in self._connected:
            again = Relay(shape=self.shape(edge), name=f"{edge.source} again")
            self.processes.append(again)
            provider.connect(again.a_in)
            provider = again.a_out
        self._connected.add((id(provider), id(target)))
        provider.connect(target)

    def delivered(self, edge: Edge, shift: int = 0) -> LavaPort:
        """The port at which an edge's value appears, behind a relay if it is late or shifted."""
        source = self.providers[edge.source, edge.source_port]
        if not edge.delay and not shift:
            return source
        key = (edge.source, edge.source_port, edge.delay, shift)
        if key not in self._relays:
            relay = Relay(
                shape=self.shape(edge),
                delay=edge.delay,
                shift=shift,
                name=f"{edge.source} delayed by {edge.delay}, shifted by {shift}",
            )
            self.processes.append(relay)
            source.connect(relay.a_in)
            self._relays[key] = relay.a_out
        return self._relays[key]

    def gated(self, edge: Edge, gate: Edge) -> LavaPort:
        """The port at which an edge's value appears without the tokens whose gate is closed."""
        key = (edge.source, edge.source_port, edge.delay, gate.source, gate.source_port, gate.delay)
        if key not in self._relays:
            relay = Relay(
                shape=self.shape(edge),
                delay=edge.delay,
                gated=True,
                name=f"{edge.source} gated by {gate.source}",
            )
            self.processes.append(relay)
            self.providers[edge.source, edge.source_port].connect(relay.a_in)
            self.delivered(gate).connect(relay.gate_in)
            self._relays[key] = relay.a_out
        return self._relays[key]

    def message_bits(self, edge: Edge) -> int:
        """Bits of a graded message; 0 stands for a spike."""
        largest = self.maxima[edge.source, edge.source_port]
        return 0 if largest <= 1 else largest.bit_length()

    def probe(self, recorders: dict[str, Recorder]) -> None:
        names = list(recorders)
        for start in range(0, len(names), Probe.WIDTH):
            some = names[start : start + Probe.WIDTH]
            probe = Probe(recorders=[recorders[n] for n in some], name=f"probe of {some[0]} ...")
            self.processes.append(probe)
            for index, name in enumerate(some):
                self.providers[name, "out"].connect(getattr(probe, f"s_in{index}"))


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    width, height, channels = wire_shape(shape)
    return width, height, channels


def _horizontal_first(pair: tuple[int, int]) -> tuple[int, int]:
    return pair[1], pair[0]


def _conv(node: Conv, wiring: _Wiring) -> None:
    (edge,) = wiring.into(node, "in")
    flipped = node.weight.transpose(0, 3, 2, 1)[:, ::-1, ::-1]
    process = LavaConv(
        weight=np.ascontiguousarray(flipped),
        input_shape=_grid(wiring.shape(edge)),
        stride=_horizontal_first(node.stride),
        padding=_horizontal_first(node.padding),
        dilation=_horizontal_first(node.dilation),
        groups=node.groups,
        num_message_bits=wiring.message_bits(edge),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, "in", process.s_in)


def _linear(node: Linear, wiring: _Wiring) -> None:
    (edge,) = wiring.into(node, "in")
    shape = wiring.shape(edge)
    bits = wiring.message_bits(edge)
    if len(shape) == 1:
        process: Any = LavaDense(
            weights=node.weight, num_message_bits=bits, sign_mode=SignMode.MIXED, name=node.name
        )
    else:
        process = LavaConv(
            weight=node.weight[:, None, None, :],
            input_shape=_grid(shape),
            num_message_bits=bits,
            name=node.name,
        )
    wiring.place(process, ((node.name, "out"), process.a_out))
    gates = wiring.into(node, "gate")
    wiring.join(
        wiring.gated(edge, gates[0]) if gates else wiring.delivered(edge), process.s_in, edge
    )


def _lif(node: LIF, wiring: _Wiring) -> None:
    constants = node.constants
    assert constants is not None, "validate() has seen to it"
    edges = wiring.into(node, "in")
    largest = sum(wiring.maxima[e.source, e.source_port] for e in edges)
    shape = wire_shape(wiring.part.shapes[node.name, "out"])
    begin = 1 + wiring.part.graph.depth[node.name]
    gated = wiring.has(node, "gate")
    if gated or largest > WRAPS_ONCE:
        process: Any = GatedLIF(
            shape=shape,
            constants=constants,
            reset_interval=wiring.part.graph.steps,
            reset_offset=begin,
            gated=gated,
            name=node.name,
        )
    else:
        process = LIFReset(
            shape=shape,
            du=constants.du,
            dv=constants.dv,
            vth=constants.threshold,
            bias_mant=np.broadcast_to(constants.bias_mantissa, shape),
            bias_exp=constants.bias_exponent,
            reset_interval=wiring.part.graph.steps,
            reset_offset=begin,
            name=node.name,
        )
    wiring.place(process, ((node.name, "out"), process.s_out))
    wiring.connect(node, "in", process.a_in)
    if gated:
        wiring.connect(node, "gate", process.gate_in)


def _or_pool(node: OrPool, wiring: _Wiring) -> None:
    (edge,) = wiring.into(node, "in")
    process = OrPoolProcess(
        shape=wiring.shape(edge),
        kernel=node.kernel,
        stride=node.stride,
        padding=node.padding,
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.s_out))
    wiring.connect(node, "in", process.s_in)


def _reshape(node: Reshape, wiring: _Wiring) -> None:
    (edge,) = wiring.into(node, "in")
    process = Relay(shape=wiring.shape(edge), layout=node.to, name=node.name)
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, "in", process.a_in)


def _add(node: Add, wiring: _Wiring) -> None:
    process = Relay(shape=wiring.part.shapes[node.name, "out"], name=node.name)
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, "in", process.a_in, node.shifts)


def _attention(node: Attention, wiring: _Wiring) -> None:
    shape = wire_shape(wiring.part.shapes[node.name, "out"])
    process = SpikingAttention(shape=shape, heads=node.heads, name=node.name)
    wiring.place(process, ((node.name, "out"), process.a_out))
    for port in ("q", "k", "v"):
        wiring.connect(node, port, getattr(process, f"{port}_in"))


def _halting_score(node: HaltingScore, wiring: _Wiring) -> None:
    (edge,) = wiring.into(node, "in")
    assert node.table is not None, "validate() has seen to it"
    process = HaltingScoreProcess(
        shape=wire_shape(wiring.shape(edge)), table=node.table, name=node.name
    )
    wiring.place(process, ((node.name, "out"), process.h_out))
    wiring.connect(node, "in", process.x_in)


def _gate(node: Gate, wiring: _Wiring) -> None:
    living = wiring.has(node, "alive")
    process = TokenGate(
        tokens=wiring.part.shapes[node.name, "out"][0],
        threshold=int(node.threshold),
        accumulate=node.accumulate,
        steps=wiring.part.graph.steps,
        depth=wiring.part.graph.depth[node.name],
        living=living,
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.gate_out))
    wiring.connect(node, "score", process.h_in)
    wiring.connect(node, "alive", process.alive_in)


def _merge(node: Merge, wiring: _Wiring) -> None:
    process = TokenMerge(
        shape=wire_shape(wiring.part.shapes[node.name, "out"]),
        node=node,
        steps=wiring.part.graph.steps,
        depth=wiring.part.graph.depth[node.name],
        connected=frozenset(p for p in node.optional_inputs if wiring.has(node, p)),
        name=node.name,
    )
    wiring.place(
        process,
        ((node.name, "out"), process.x_out),
        ((node.name, "gate"), process.gate_out),
        ((node.name, "alive"), process.alive_out),
        ((node.name, "size"), process.size_out),
    )
    for port in node.inputs + node.optional_inputs:
        wiring.connect(node, port, getattr(process, f"{port}_in"))


def _readout(node: Readout, wiring: _Wiring) -> None:
    (edge,) = wiring.into(node, "x")
    sized = wiring.has(node, "size")
    process = ReadoutProcess(
        shape=wire_shape(wiring.shape(edge)),
        weight=node.weight.astype(np.int64),
        bias=node.bias.astype(np.int64),
        steps=wiring.part.graph.steps,
        depth=wiring.part.graph.depth[node.name],
        sized=sized,
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, "x", process.x_in)
    wiring.connect(node, "size", process.size_in)


_BUILDERS: dict[str, Callable[[Any, _Wiring], None]] = {
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
