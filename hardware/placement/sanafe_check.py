"""The same placed network and the same spikes through SANA-FE's Loihi model, compared by cause.

SANA-FE (PyPI `sanafe`, optional) simulates neurons, messages and hops of Loihi on its own. Here
every
neuron of the placed network stands on the same core of the same tile twice: as a *sender* that
replays the spikes of our engine, and as a Loihi neuron with all its synapses, which computes its
own. So its spikes are a second opinion on the engine's, and its counts and joules one on ours.

What SANA-FE does not have, and so is compared as far as it goes: values above 1 (refused), gates
(it visits the neurons of closed tokens too: listed as a difference), halting scores, merges,
attention and readouts (left out, listed).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import ACTIVATION_SHIFT, DECAY_UNITY, lif_step
from export.graph import LIF, Conv, Linear
from hardware.engine import image_axis, run, select
from hardware.errors import PlacementError
from hardware.placement.activity import gate_of, messages_of, recorded_names, values_of
from hardware.placement.energy import layer_cost
from hardware.placement.layers import Layer, Network, Path, trace_name, window_reach
from hardware.placement.measure import LayerEvents, PlacedEvents, measure
from hardware.placement.place import Placement
from hardware.profile import load_profile

HELD = ("LIF", "Add", "OrPool")
"""Kinds of layers that SANA-FE can hold."""
_MOST = 1024
_UNIT = float(1 << ACTIVATION_SHIFT)


@dataclass(frozen=True)
class SanafeComparison:
    """One placed network, one image: ours and SANA-FE's.

    Attributes:
        counts: event -> (ours, SANA-FE's): spikes, synaptic operations, messages, hops, updates.
        joules: cause -> (ours, SANA-FE's).
        explained: what SANA-FE does by its own rules and we do not: cause -> (events, joules),
            worked out from our side alone. Visits of neurons whose gate is closed (it has no
            gates), updates of those that still hold a potential, and updates by inputs that add up
            to 0, which we count as idle.
        left_out: layers that SANA-FE cannot hold.
        spikes_differ: neurons and steps where its own spikes differ from the engine's.
    """

    counts: Mapping[str, tuple[int, int]]
    joules: Mapping[str, tuple[float, float]]
    explained: Mapping[str, tuple[int, float]]
    left_out: tuple[str, ...]
    spikes_differ: int

    @property
    def total(self) -> tuple[float, float]:
        """Joules in all: ours with what is explained, and SANA-FE's."""
        ours = sum(pair[0] for pair in self.joules.values())
        ours += sum(joules for _, joules in self.explained.values())
        return ours, sum(pair[1] for pair in self.joules.values())

    @property
    def relative(self) -> float:
        """Difference of the totals, relative to SANA-FE's."""
        ours, theirs = self.total
        return abs(ours - theirs) / theirs if theirs else 0.0


def missing() -> str | None:
    """Why SANA-FE cannot be used, in one line; None if it can."""
    try:
        import sanafe  # noqa: F401
    except ModuleNotFoundError:
        return "SANA-FE is not installed (pip install sanafe, extra `sanafe`)"
    return None


def compare(placement: Placement, image: npt.NDArray[np.uint8]) -> SanafeComparison:
    """Run one image through both.

    Args:
        placement: on one chip of profile `loihi1_calibrated`.
        image: the pixels of one image, [1, *input shape] (events [T, 1, ...]), 1 bit a pixel.

    Raises:
        PlacementError: SANA-FE is not installed, more than one chip, or values above 1.
    """
    problem = missing()
    if problem:
        raise PlacementError(problem)
    if placement.mesh.chips > 1:
        raise PlacementError(
            f"the network takes {placement.mesh.chips} chips, SANA-FE's Loihi is one; compare a "
            "smaller network"
        )
    graph = placement.network.graph
    one = select(image, image_axis(graph, image), slice(0, 1))
    inputs = {edge.source for node in graph.of_kind(LIF) for edge in graph.into(node.name, "in")}
    trace = run(graph, one, record=recorded_names(placement.network) | inputs).trace
    events = measure(placement, one)
    theirs = _Twin(placement, trace).simulate()
    return _compared(placement, events, theirs, trace)


@dataclass
class _Theirs:
    """What SANA-FE counted, its first (empty) step of the neurons left out."""

    spikes: int
    differ: int
    sops: int
    messages: int
    hops: int
    updates: int
    visits: int
    joules: dict[str, float] = field(default_factory=dict)


class _Twin:
    """The placed network in SANA-FE."""

    def __init__(self, placement: Placement, trace: Mapping[str, npt.NDArray]) -> None:
        sanafe: Any = importlib.import_module("sanafe")  # compiled, without types
        self.placement, self.trace = placement, trace
        self.network = sanafe.Network()
        self.arch = sanafe.load_loihi()
        self.chip_of = sanafe.SpikingChip
        self.cores = self._cores()
        self.steps = placement.network.graph.steps
        self.inputs_used: dict[int, int] = {}
        self.paths = 0
        self.sent = np.zeros(self.steps, np.int64)
        self.order: dict[int, list[Any]] = {}
        self.held = [x for x in placement.network.layers.values() if x.kind in HELD]
        self.cells = {layer.name: self._cells(layer) for layer in self.held}

    def _cores(self) -> list[Any]:
        """SANA-FE's core of each place: its tiles are numbered along y."""
        mesh = self.placement.mesh
        found = self.arch.cores()
        per_tile = mesh.cores_per_tile
        tile = mesh.x.astype(int) * mesh.rows + mesh.y.astype(int)
        offset = np.arange(mesh.places) % per_tile
        return [
            found[t * per_tile + o] for t, o in zip(tile.tolist(), offset.tolist(), strict=True)
        ]

    def _core_of(self, layer: str) -> npt.NDArray[np.int64]:
        """Place of each neuron, [channels, positions]."""
        split = self.placement.splits[layer]
        tile = split.row_of[None, :] * split.columns + split.column_of[:, None]
        return self.placement.place_of(layer)[tile]

    def _cells(self, layer: Layer) -> Any:
        """Loihi neurons of a layer, in the order [channels, positions]."""
        count = layer.grid.neurons
        group = self.network.create_neuron_group(layer.name, count)
        node = self.placement.network.graph[layer.node]
        places = self._core_of(layer.name).reshape(-1)
        settings: list[dict[str, Any]] = [_relay()] * count
        if isinstance(node, LIF):
            settings = _lif(node, layer)
        for index in range(count):
            cell = group[index]
            cell.set_attributes(
                soma_hw_name="loihi_lif",
                dendrite_hw_name="loihi_dendrites",
                default_synapse_hw_name=_synapse(layer),
                log_spikes=True,
                model_attributes=settings[index],
            )
            self.order.setdefault(int(places[index]), []).append(cell)
        return group

    def simulate(self) -> _Theirs:
        for path in [path for layer in self.held for path in layer.data_paths]:
            self._connect(path)
        fullest = max(len(cells) for cells in self.order.values())
        if fullest > _MOST:
            raise PlacementError(
                f"a core would hold {fullest:,} neurons and senders, SANA-FE's Loihi holds "
                f"{_MOST:,}; place with fewer neurons a core, or compare a smaller network"
            )
        for place in sorted(self.order):
            for cell in self.order[place]:
                cell.map_to_core(self.cores[place])
        chip = self.chip_of(self.arch)
        chip.load(self.network)
        found = chip.sim(
            self.steps + 1, timing_model="simple", perf_trace=True, spike_trace=True,
            message_trace=True,
        )  # fmt: skip
        return self._counted(found)

    # --- senders ---

    def _connect(self, path: Path) -> None:
        """Senders and synapses of one path; another path of the same source has its own axons."""
        network = self.placement.network
        values = values_of(path, network, self.trace)[:, 0]
        gate = gate_of(path, network, self.trace)
        if gate is not None:
            values = values * gate[:, 0, :, None]
        if not path.grid.maps:
            values = np.swapaxes(values, 1, 2)
        if values.max(initial=0) > 1 or values.min(initial=0) < 0:
            raise PlacementError(
                f"{path.source} sends values up to {values.max()}, SANA-FE has unit spikes only; "
                "compare a network without graded values"
            )
        spikes = values.reshape(self.steps, -1).astype(bool)
        places = np.zeros(spikes.shape[1], np.int64)
        if path.source in network.layers:
            places = self._core_of(path.source).reshape(-1)
        name = f"path {self.paths}: {path.source}"
        self.paths += 1
        self.sent += spikes.sum(axis=1)
        senders = self.network.create_neuron_group(name, spikes.shape[1])
        for index in range(spikes.shape[1]):
            self._sender(senders[index], spikes[:, index], int(places[index]))
        cells = self.cells[path.target]
        for source, target, weight in _synapses(path, network.layers[path.target]):
            senders[source].connect_to_neuron(cells[target], {"weight": weight})

    def _sender(self, cell: Any, spikes: npt.NDArray[np.bool_], place: int) -> None:
        unit = self.inputs_used.get(place, 0)
        self.inputs_used[place] = unit + 1
        cell.set_attributes(
            soma_hw_name=f"loihi_inputs[{unit}]",
            dendrite_hw_name="loihi_dendrites",
            default_synapse_hw_name="loihi_dense_synapse",
            model_attributes={"spikes": [bool(s) for s in spikes]},
        )
        self.order.setdefault(place, []).append(cell)

    # --- results ---

    def _counted(self, found: Mapping[str, Any]) -> _Theirs:
        perf = found["perf_trace"]
        column = {name: np.asarray(values, float) for name, values in perf.items()}
        fired = self._own_spikes(found["spike_trace"])
        differ = spikes = 0
        for layer in self.held:
            ours = self.trace[layer.name][:, 0] != 0
            if not layer.grid.maps:
                ours = ours.reshape(self.steps, layer.grid.positions, layer.grid.channels)
                ours = np.swapaxes(ours, 1, 2)
            theirs = fired[layer.name]
            differ += int((ours.reshape(self.steps, -1) != theirs).sum())
            spikes += int(theirs.sum())
        cells = sum(layer.grid.neurons for layer in self.held)
        updated = column["updated"][1:].sum() - self.sent[1:].sum()  # senders count as updated
        return _Theirs(
            spikes=spikes,
            differ=differ,
            sops=int(column["spikes"].sum()),
            messages=int(found["packets_sent"]),
            hops=int(column["hops"].sum()),
            updates=int(updated),
            visits=cells * self.steps,
            joules={
                "synapse": float(column["synapse_energy"].sum()),
                "soma": float(column["soma_energy"][1:].sum()),
                "message": float(column["network_energy"].sum()),
            },
        )

    def _own_spikes(self, trace: Any) -> dict[str, npt.NDArray[np.bool_]]:
        """Spikes of the Loihi neurons, set back by the step that a message takes."""
        out = {
            layer.name: np.zeros((self.steps, layer.grid.neurons), np.bool_) for layer in self.held
        }
        for step, addresses in enumerate(trace):
            for address in addresses:
                if step and address.group_name in out:
                    out[address.group_name][step - 1, address.neuron_offset] = True
        return out


def _synapse(layer: Layer) -> str:
    convolved = any(path.kind == "conv" for path in layer.paths)
    return "loihi_conv_synapse" if convolved else "loihi_dense_synapse"


def _relay() -> dict[str, Any]:
    """Fires whenever something arrives, and keeps nothing."""
    return {"threshold": 0.5, "leak_decay": 0.0, "input_decay": 0.0, "reset_mode": "hard"}


def _lif(node: LIF, layer: Layer) -> list[dict[str, Any]]:
    """Our fixed point in SANA-FE's units (64 of ours); its first step adds only the bias."""
    constants = node.constants
    assert constants is not None  # quantised
    if constants.du != DECAY_UNITY - 1:
        raise PlacementError(
            f"{layer.label}: it has a current memory (du {constants.du}), which this comparison "
            "does not carry over; compare a layer with du 4095"
        )
    decay = (DECAY_UNITY - constants.dv) / DECAY_UNITY
    bias = np.repeat(constants.bias.astype(float) / _UNIT, layer.grid.positions)
    return [
        {
            "threshold": float(constants.threshold),
            "leak_decay": decay,
            "input_decay": 0.0,
            "reset_mode": "hard",
            "bias": float(b),
            "potential": -float(b),
        }
        for b in bias
    ]


def _synapses(path: Path, layer: Layer) -> Iterator[tuple[int, int, float]]:
    """(source, target, weight) of every synapse, indices in the order [channels, positions]."""
    positions = layer.grid.positions
    if path.kind == "linear":
        assert isinstance(path.synapse, Linear)
        yield from _linear(path, path.synapse.weight, positions)
    elif path.kind == "conv":
        assert isinstance(path.synapse, Conv)
        yield from _conv(path, path.synapse, positions)
    elif path.kind == "pool":
        reach = window_reach(path).tocoo()
        for channel in range(layer.grid.channels):
            for target, source in zip(reach.row.tolist(), reach.col.tolist(), strict=True):
                yield channel * path.grid.positions + source, channel * positions + target, 1.0
    elif path.kind == "same" and not path.flatten:
        for index in range(layer.grid.neurons):
            yield index, index, 1.0
    else:
        raise PlacementError(
            f"{layer.label}: a path of kind {path.kind} cannot be carried over to SANA-FE"
        )


def _linear(path: Path, weight: npt.NDArray, positions: int) -> Iterator[tuple[int, int, float]]:
    outputs, inputs = weight.shape
    if path.flatten:
        flat = np.arange(inputs)
        if not path.grid.maps:  # tokens lie [N, D], senders [D, N]
            flat = (flat % path.grid.channels) * path.grid.positions + flat // path.grid.channels
        for i in range(inputs):
            for o in range(outputs):
                yield int(flat[i]), o, float(weight[o, i])
        return
    for i in range(inputs):
        for o in range(outputs):
            for p in range(positions):
                yield i * positions + p, o * positions + p, float(weight[o, i])


def _conv(path: Path, conv: Conv, positions: int) -> Iterator[tuple[int, int, float]]:
    height, width = path.grid.size
    outputs, per_group, kernel_y, kernel_x = conv.weight.shape
    out_width = (
        width + 2 * conv.padding[1] - conv.dilation[1] * (kernel_x - 1) - 1
    ) // conv.stride[1] + 1
    for target in range(positions):
        top, left = divmod(target, out_width)
        for ky in range(kernel_y):
            for kx in range(kernel_x):
                y = top * conv.stride[0] - conv.padding[0] + ky * conv.dilation[0]
                x = left * conv.stride[1] - conv.padding[1] + kx * conv.dilation[1]
                if not (0 <= y < height and 0 <= x < width):
                    continue
                for o in range(outputs):
                    group = o // (outputs // conv.groups)
                    for i in range(per_group):
                        source = (group * per_group + i) * height * width + y * width + x
                        yield source, o * positions + target, float(conv.weight[o, i, ky, kx])


def _compared(
    placement: Placement,
    events: PlacedEvents,
    theirs: _Theirs,
    trace: Mapping[str, npt.NDArray],
) -> SanafeComparison:
    held = [layer for layer in events.layers if layer.kind in HELD]
    prices = load_profile("loihi1_calibrated")

    def of(name: str) -> int:
        return sum(layer.sum(name) for layer in held)

    def joules(cause: str) -> float:
        return sum(
            layer_cost(layer, prices, _convolved(placement, layer), events.images)[cause].low
            for layer in held
        )

    energy = prices.energy
    assert energy.neuron_update_active is not None
    assert energy.neuron_update_idle is not None
    visit = energy.neuron_update_idle.middle
    update = energy.neuron_update_active.middle - visit
    gated, leaking, cancelled = of("updates_gated"), 0, 0
    for layer in held:
        if layer.kind == "LIF":
            found = _updates_by_their_rule(placement, layer.name, trace)
            leaking, cancelled = leaking + found[0], cancelled + found[1]
    return SanafeComparison(
        counts={
            "spikes": (sum(layer.fired for layer in held), theirs.spikes),
            "synaptic operations": (of("sops"), theirs.sops),
            "messages": (of("received") - of("control"), theirs.messages),
            "hops": (sum(sum(_data_hops(layer)) for layer in held), theirs.hops),
            "updates": (of("updates_active") + leaking + cancelled, theirs.updates),
        },
        joules={
            "synapse": (joules("synapse"), theirs.joules["synapse"]),
            "soma": (joules("neuron") + joules("idle"), theirs.joules["soma"]),
            "message": (sum(_message_joules(x) for x in held), theirs.joules["message"]),
        },
        explained={
            "visits behind closed gates": (gated, gated * visit),
            "updates behind closed gates": (leaking, leaking * update),
            "inputs that add up to 0": (cancelled, cancelled * update),
        },
        left_out=tuple(layer.name for layer in events.layers if layer.kind not in HELD),
        spikes_differ=theirs.differ,
    )


def _convolved(placement: Placement, layer: LayerEvents) -> bool:
    return any(path.kind == "conv" for path in placement.network.layers[layer.name].paths)


def _data_hops(layer: LayerEvents) -> tuple[int, int]:
    """Hops without those of gates and sizes, which SANA-FE does not know."""
    east, north = layer.control_hops
    return layer.east_west - east, layer.north_south - north


def _message_joules(layer: LayerEvents) -> float:
    """Messages into a layer; those of the image too, which SANA-FE's senders send and pay for."""
    prices = load_profile("loihi1_calibrated").energy
    messages = layer.sum("received") - layer.sum("control")
    east, north = _data_hops(layer)
    return sum(
        count * quantity.middle
        for count, quantity in (
            (messages, prices.message_out),
            (messages, prices.message_in),
            (east, prices.hop_east_west),
            (north, prices.hop_north_south),
        )
        if quantity is not None
    )


def _updates_by_their_rule(
    placement: Placement, name: str, trace: Mapping[str, npt.NDArray]
) -> tuple[int, int]:
    """Updates that SANA-FE makes and we do not: behind closed gates, and by inputs that cancel.

    It updates a neuron that has a potential, a bias, or an input of any value, and knows no gates.
    """
    network = placement.network
    layer, node = network.layers[name], network.graph[network.layers[name].node]
    assert isinstance(node, LIF)
    assert node.constants is not None
    edge = network.graph.into(node.name, "in")[0]
    steps = len(trace[name])
    arriving = trace[trace_name(edge.source, edge.source_port)][:, 0].reshape(
        -1, *trace[name].shape[2:]
    )
    arrived = sum(_arrived(path, layer, network, trace) for path in layer.data_paths)
    assert not isinstance(arrived, int)
    shape = arriving.shape[1:]
    bias = node.constants.bias[:, None, None] if len(shape) == 3 else node.constants.bias
    bias = np.broadcast_to(bias, shape)
    gate = np.ones((steps, *shape), np.bool_)
    if layer.gate is not None:
        gate = gate & (trace[trace_name(*layer.gate)][:, 0, :, None] != 0)
    current, voltage = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    leaking = cancelled = 0
    for t in range(steps):
        now = arriving[t % len(arriving)]
        held = (voltage != 0) | (bias != 0)
        leaking += int((~gate[t] & (held | arrived[t].reshape(shape))).sum())
        silent = gate[t] & ~held & (now == 0) & arrived[t].reshape(shape)
        cancelled += int(silent.sum())
        step = lif_step(current, voltage, now, node.constants, bias)
        current, voltage = step.current, step.voltage
    return leaking, cancelled


def _arrived(
    path: Path, layer: Layer, network: Network, trace: Mapping[str, npt.NDArray]
) -> npt.NDArray[np.bool_]:
    """Where any message of a path arrives, in the layout of the layer: bool [T, ., .]."""
    sent = messages_of(path, network, trace)[:, 0]
    steps, positions, channels = len(sent), layer.grid.positions, layer.grid.channels
    if path.kind == "conv":
        assert isinstance(path.synapse, Conv)
        groups = path.synapse.groups
        by_group = sent.reshape(steps, sent.shape[1], groups, -1).any(axis=3)
        reach = window_reach(path)
        met = np.stack([reach @ step.astype(int) > 0 for step in by_group])
        found = np.repeat(met, channels // groups, axis=2)
    elif path.kind == "linear" and not path.flatten:
        found = np.repeat(sent.any(axis=2, keepdims=True), channels, axis=2)
    elif path.kind == "linear":
        found = np.broadcast_to(sent.any(axis=(1, 2))[:, None, None], (steps, positions, channels))
    else:
        found = sent
    return np.swapaxes(found, 1, 2) if layer.grid.maps else found
