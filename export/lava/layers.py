"""A part of a network as one Lava process per node: standard processes wherever Lava has them.

Delays wait at the in-ports of our own processes; in front of a standard process a relay waits.

Wiring rules, each against a trap of Lava 0.10.0: in-ports always sum, neither late nor shifted, so
a sum is a process with a port for each term; the same source twice into one port is refused by
Lava, so the second goes through a relay; reshaped (virtual) ports go wrong at in-ports of
hierarchical processes, so layouts change in relays.
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

from atsnn.fixed_point import NeuronConstants
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
from export.lava.processes.relay.process import Relay, Sum
from export.lava.processes.token.process import HaltingScore as HaltingScoreProcess
from export.lava.processes.token.process import TokenGate, TokenMerge
from export.lava.wire import Recorder, wire_shape
from export.ranges import maxima

LavaPort = Any
"""An InPort or OutPort; Lava gives them no useful common type."""
Ports = dict[str, str]
"""In-port of one of our own processes by input port of its node."""


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

    def only(self, node: Node, port: str = "in") -> Edge:
        (edge,) = self.into(node, port)
        return edge

    def shape(self, edge: Edge) -> tuple[int, ...]:
        return self.part.shapes[edge.source, edge.source_port]

    def provider(self, edge: Edge) -> LavaPort:
        return self.providers[edge.source, edge.source_port]

    def delays(self, node: Node, ports: Ports) -> dict[str, int]:
        """How late the ports of one of our own processes are; only connected ones are named."""
        edges = {ours: self.into(node, port) for port, ours in ports.items()}
        return {
            ours: arriving[0].delay if len(arriving) == 1 else 0
            for ours, arriving in edges.items()
            if arriving
        }

    def connect(self, node: Node, process: Any, ports: Ports) -> None:
        """Connect one of our own processes, whose ports wait by themselves unless they sum."""
        for port, ours in ports.items():
            arriving = self.into(node, port)
            for edge in arriving:
                provider = self.provider(edge) if len(arriving) == 1 else self.delivered(edge)
                self.join(provider, getattr(process, ours), edge)

    def join(self, provider: LavaPort, target: LavaPort, edge: Edge) -> None:
        """Connect two ports; a second connection of the same pair goes through a relay."""
        if (id(provider), id(target)) in self._connected:
            again = self.relay(edge, f"{edge.source} again", {"a_in": 0})
            provider.connect(again.a_in)
            provider = again.a_out
        self._connected.add((id(provider), id(target)))
        provider.connect(target)

    def relay(self, edge: Edge, name: str, delays: dict[str, int]) -> Relay:
        relay = Relay(shape=self.shape(edge), delays=delays, name=name)
        self.processes.append(relay)
        return relay

    def delivered(self, edge: Edge) -> LavaPort:
        """The port at which an edge's value appears in time, behind a relay if it must wait."""
        if not edge.delay:
            return self.provider(edge)
        key = (edge.source, edge.source_port, edge.delay)
        if key not in self._relays:
            name = f"{edge.source} delayed by {edge.delay}"
            relay = self.relay(edge, name, {"a_in": edge.delay})
            self.provider(edge).connect(relay.a_in)
            self._relays[key] = relay.a_out
        return self._relays[key]

    def gated(self, edge: Edge, gate: Edge) -> LavaPort:
        """The port at which an edge's value appears without the tokens whose gate is closed."""
        if self._silent_where_closed(edge, gate):
            return self.delivered(edge)
        key = (edge.source, edge.source_port, edge.delay, gate.source, gate.source_port, gate.delay)
        if key not in self._relays:
            name = f"{edge.source} gated by {gate.source}"
            relay = self.relay(edge, name, {"a_in": edge.delay, "gate_in": gate.delay})
            self.provider(edge).connect(relay.a_in)
            self.provider(gate).connect(relay.gate_in)
            self._relays[key] = relay.a_out
        return self._relays[key]

    def _silent_where_closed(self, edge: Edge, gate: Edge) -> bool:
        """Whether the value comes from neurons that the same gate keeps silent already."""
        same = (gate.source, gate.source_port)
        gates = self.part.graph.into(edge.source, "gate")
        source = self.part.graph[edge.source]
        return isinstance(source, LIF) and same in {(g.source, g.source_port) for g in gates}

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
    edge = wiring.only(node)
    flipped = node.weight.astype(np.int32).transpose(0, 3, 2, 1)[:, ::-1, ::-1]
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
    wiring.join(wiring.delivered(edge), process.s_in, edge)


def _linear(node: Linear, wiring: _Wiring) -> None:
    edge = wiring.only(node)
    shape = wiring.shape(edge)
    bits = wiring.message_bits(edge)
    if len(shape) == 1:
        process: Any = LavaDense(
            weights=node.weight.astype(np.int32),
            num_message_bits=bits,
            sign_mode=SignMode.MIXED,
            name=node.name,
        )
    else:
        process = LavaConv(
            weight=node.weight.astype(np.int32)[:, None, None, :],
            input_shape=_grid(shape),
            num_message_bits=bits,
            name=node.name,
        )
    wiring.place(process, ((node.name, "out"), process.a_out))
    gates = wiring.into(node, "gate")
    provider = wiring.gated(edge, gates[0]) if gates else wiring.delivered(edge)
    wiring.join(provider, process.s_in, edge)


def _lif(node: LIF, wiring: _Wiring) -> None:
    edge = wiring.only(node)
    gated = bool(wiring.into(node, "gate"))
    if gated or wiring.maxima[edge.source, edge.source_port] > WRAPS_ONCE:
        _gated_lif(node, wiring)
    else:
        _lif_reset(node, wiring)


def _constants(node: LIF) -> NeuronConstants:
    assert node.constants is not None, "validate() has seen to it"
    return node.constants


def _gated_lif(node: LIF, wiring: _Wiring) -> None:
    ports = {"in": "a_in", "gate": "gate_in"}
    process = GatedLIF(
        shape=wire_shape(wiring.part.shapes[node.name, "out"]),
        constants=_constants(node),
        reset_interval=wiring.part.graph.steps,
        reset_offset=1 + wiring.part.graph.depth[node.name],
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.s_out))
    wiring.connect(node, process, ports)


def _lif_reset(node: LIF, wiring: _Wiring) -> None:
    constants, edge = _constants(node), wiring.only(node)
    shape = wire_shape(wiring.part.shapes[node.name, "out"])
    process = LIFReset(
        shape=shape,
        du=constants.du,
        dv=constants.dv,
        vth=constants.threshold,
        bias_mant=np.broadcast_to(constants.bias_mantissa, shape),
        bias_exp=constants.bias_exponent,
        reset_interval=wiring.part.graph.steps,
        reset_offset=1 + wiring.part.graph.depth[node.name],
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.s_out))
    wiring.join(wiring.delivered(edge), process.a_in, edge)


def _or_pool(node: OrPool, wiring: _Wiring) -> None:
    ports = {"in": "s_in"}
    process = OrPoolProcess(
        shape=wiring.shape(wiring.only(node)),
        kernel=node.kernel,
        stride=node.stride,
        padding=node.padding,
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.s_out))
    wiring.connect(node, process, ports)


def _reshape(node: Reshape, wiring: _Wiring) -> None:
    ports = {"in": "a_in"}
    process = Relay(
        shape=wiring.shape(wiring.only(node)),
        layout=node.to,
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, process, ports)


def _add(node: Add, wiring: _Wiring) -> None:
    edges = wiring.into(node, "in")
    process = Sum(
        shape=wire_shape(wiring.part.shapes[node.name, "out"]),
        shifts=node.shifts,
        delays={f"a_in{index}": edge.delay for index, edge in enumerate(edges)},
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.a_out))
    for index, edge in enumerate(edges):
        wiring.provider(edge).connect(getattr(process, f"a_in{index}"))


def _attention(node: Attention, wiring: _Wiring) -> None:
    ports = {"q": "q_in", "k": "k_in", "v": "v_in"}
    process = SpikingAttention(
        shape=wire_shape(wiring.part.shapes[node.name, "out"]),
        heads=node.heads,
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, process, ports)


def _halting_score(node: HaltingScore, wiring: _Wiring) -> None:
    ports = {"in": "x_in"}
    assert node.table is not None, "validate() has seen to it"
    process = HaltingScoreProcess(
        shape=wire_shape(wiring.shape(wiring.only(node))),
        table=node.table,
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.h_out))
    wiring.connect(node, process, ports)


def _gate(node: Gate, wiring: _Wiring) -> None:
    ports = {"score": "h_in", "alive": "alive_in"}
    process = TokenGate(
        tokens=wiring.part.shapes[node.name, "out"][0],
        threshold=int(node.threshold),
        accumulate=node.accumulate,
        steps=wiring.part.graph.steps,
        depth=wiring.part.graph.depth[node.name],
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.gate_out))
    wiring.connect(node, process, ports)


def _merge(node: Merge, wiring: _Wiring) -> None:
    ports = {port: f"{port}_in" for port in node.inputs + node.optional_inputs}
    process = TokenMerge(
        shape=wire_shape(wiring.part.shapes[node.name, "out"]),
        node=node,
        steps=wiring.part.graph.steps,
        depth=wiring.part.graph.depth[node.name],
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(
        process,
        ((node.name, "out"), process.x_out),
        ((node.name, "gate"), process.gate_out),
        ((node.name, "alive"), process.alive_out),
        ((node.name, "size"), process.size_out),
    )
    wiring.connect(node, process, ports)


def _readout(node: Readout, wiring: _Wiring) -> None:
    ports = {"x": "x_in", "size": "size_in"}
    process = ReadoutProcess(
        shape=wire_shape(wiring.shape(wiring.only(node, "x"))),
        weight=node.weight.astype(np.int64),
        bias=node.bias.astype(np.int64),
        steps=wiring.part.graph.steps,
        depth=wiring.part.graph.depth[node.name],
        delays=wiring.delays(node, ports),
        name=node.name,
    )
    wiring.place(process, ((node.name, "out"), process.a_out))
    wiring.connect(node, process, ports)


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
