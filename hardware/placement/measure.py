"""Events of every tile and core, from the engine's spikes on real images, a few images at a time.

Sums over tiles equal the engine's `EventCounts` to the last event. On top of those
stands what only a placement has: messages per reading core (multicast), hops, borders between
chips, messages that tell cores of closed gates, coincidences that an attention repeats because it
is cut, core-steps dark, and the time that each step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import ACTIVATION_LIMIT, DECAY_UNITY, lif_step
from atsnn.threads import KERNELS
from export.graph import LIF, Graph, Merge
from hardware.engine import Engine, EngineResult, image_axis, select
from hardware.engine.plan import Plan, make_plan
from hardware.errors import PlacementError
from hardware.events import FIELDS, SCORES_FIRST, TABLE_FIRST, EventCounts
from hardware.placement import tallies
from hardware.placement.activity import CHUNK, gate_of, recorded_names, values_of
from hardware.placement.flows import Distances, Flow, distances, flow_of
from hardware.placement.layers import RELAYS, SUMS, Layer, Path, trace_name
from hardware.placement.place import Placement
from hardware.placement.split import Ints, Split
from hardware.placement.timing import Clock, StepTimes

Array = npt.NDArray
TILE_FIELDS = (*FIELDS, "repeats", "received", "sent", "control", "dark")
"""Fields of a tile: the engine's, and what only a placement has."""
_ORDERS = {
    SCORES_FIRST: tallies.attend_by_scores,
    TABLE_FIRST: tallies.attend_by_table,
}


@dataclass
class LayerEvents:
    """Events of one layer, summed over all images.

    Attributes:
        counts: field of `TILE_FIELDS` -> int64 [tiles]. `messages` counts a message once however
            many cores read it (it stands in the first tile); `received` and `sent` count copies;
            `control` those of `received` that carry gates and sizes; `dark` the steps in which no
            neuron of the tile was updated and nothing arrived.
        east_west, north_south, crossings: hops and borders of the messages that it receives;
            control_hops: the part of the hops (east-west, north-south) that carries gates and
                sizes.
        order: of an attention.
    """

    name: str
    node: str
    kind: str
    block: str
    tiles: int
    order: str = ""
    counts: dict[str, Ints] = field(default_factory=dict)
    east_west: int = 0
    north_south: int = 0
    crossings: int = 0
    control_hops: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name in TILE_FIELDS:
            self.counts.setdefault(name, np.zeros(self.tiles, np.int64))

    def sum(self, name: str) -> int:
        """Total of a field over tiles and images."""
        return int(self.counts[name].sum())

    @property
    def fired(self) -> int:
        """Neurons that sent something: spikes, and values of relays that are not 0."""
        return self.sum("updates_active" if self.kind in RELAYS else "spikes")


@dataclass(frozen=True, eq=False)
class PlacedEvents:
    """Events of a placed network over the same images.

    Attributes:
        layers: in the order of the network.
        images, steps: how many. average_tokens: open gates / (L * T * N).
        engine: the engine's own counts, summed over images: (node of a layer, field) -> events.
            What it counts at a Conv or Linear stands with the layer that these are the synapses of.
        core_dark: steps in which each core was dark, int64 [cores].
        gateable: cores with at least one tile whose neurons a gate switches off, bool [cores].
        times: how long the steps took.
        classes: class of each image, int64 [images].
    """

    layers: tuple[LayerEvents, ...]
    images: int
    steps: int
    average_tokens: float
    engine: Mapping[tuple[str, str], int]
    core_dark: Ints
    gateable: npt.NDArray[np.bool_]
    times: StepTimes
    classes: Ints

    def mean(self, name: str) -> float:
        """A field over all layers, mean per image."""
        return sum(layer.sum(name) for layer in self.layers) / self.images

    @property
    def hops(self) -> tuple[float, float]:
        """Hops per image, east-west and north-south."""
        return (
            sum(layer.east_west for layer in self.layers) / self.images,
            sum(layer.north_south for layer in self.layers) / self.images,
        )

    @property
    def crossings(self) -> float:
        """Messages over a border between chips, per image."""
        return sum(layer.crossings for layer in self.layers) / self.images

    @property
    def dark_share(self) -> float:
        """Share of core-steps in which the core is dark."""
        return float(self.core_dark.mean() / (self.images * self.steps))

    @property
    def dark_share_gateable(self) -> float:
        """The same of the cores that a gate can switch off; 0 if there are none."""
        if not self.gateable.any():
            return 0.0
        return float(self.core_dark[self.gateable].mean() / (self.images * self.steps))


def differences(events: PlacedEvents) -> list[str]:
    """Where sums over tiles differ from the engine's counts: none, or a defect of this package."""
    found = []
    placed: dict[tuple[str, str], int] = {}
    for layer in events.layers:
        for name in FIELDS:
            placed[layer.node, name] = placed.get((layer.node, name), 0) + layer.sum(name)
    for key in dict.fromkeys([*placed, *events.engine]):
        ours, engine = placed.get(key, 0), events.engine.get(key, 0)
        if ours != engine:
            found.append(f"{key[0]}: {key[1]} {ours} after placement, {engine} by the engine")
    return found


def measure(
    placement: Placement,
    images: npt.NDArray[np.uint8],
    *,
    graph: Graph | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PlacedEvents:
    """Run the placed network on images and count per tile and core.

    Args:
        placement: of a quantised graph.
        images: uint8 [B, *input shape], or events [T, B, *input shape].
        graph: a graph with the same layers and paths, to run in place of the placed one (more gates
            closed or open on the same cores); None: the placed one.
        progress: called with (images done, images in all).

    Raises:
        PlacementError: the sums differ from the engine's counts (a defect, never the user's fault).
        EngineError: see `hardware.engine.run`.
    """
    placed = placement.network.graph
    running = graph or placed
    counter = _Counter(placement, running, images)
    axis = image_axis(running, images)
    count = images.shape[axis]
    names = recorded_names(placement.network) | counter.inputs_of_idle
    engine = Engine(running)
    for start in range(0, count, CHUNK):
        part = select(images, axis, slice(start, start + CHUNK))
        result = engine.run(part, record=names)
        with KERNELS:
            counter.add(result)
        if progress:
            progress(min(start + CHUNK, count), count)
    events = counter.result()
    wrong = differences(events)
    if wrong:
        raise PlacementError(
            f"{len(wrong)} counts after placement differ from the engine's ({wrong[0]}); this is a "
            "defect of hardware.placement, please report it with the graph"
        )
    return events


@dataclass(frozen=True, eq=False)
class _Way:
    """A flow with its distances on the mesh."""

    flow: Flow
    distance: Distances
    unit: int
    multiplied: bool
    pixels: bool
    counted: bool


class _Counter:
    """Collects; one call of `add` for each few images."""

    def __init__(self, placement: Placement, graph: Graph, images: npt.NDArray[np.uint8]) -> None:
        self.placement, self.network = placement, placement.network
        self.graph = graph
        self.plan = make_plan(graph, bool(image_axis(graph, images)))
        self.steps = graph.steps
        self.layers = {
            layer.name: LayerEvents(
                layer.name,
                layer.node,
                layer.kind,
                layer.block,
                placement.splits[layer.name].tiles,
                placement.splits[layer.name].order or (TABLE_FIRST if layer.table_bits else ""),
            )
            for layer in self.network.layers.values()
        }
        self.ways = {name: self._ways(layer) for name, layer in self.network.layers.items()}
        self.idle = {
            layer.name: source
            for layer in self.network.layers.values()
            if (source := _input_of_idle(graph, layer))
        }
        self.inputs_of_idle = set(self.idle.values())
        self.clock = Clock(placement, self.graph)
        self.core_dark = np.zeros(placement.cores, np.int64)
        self.engine: dict[tuple[str, str], int] = {}
        self.layer_of = {
            path.node: layer.node for layer in self.network.layers.values() for path in layer.paths
        }
        self.images = 0
        self.open_tokens = 0.0
        self.classes: list[Ints] = []

    def _ways(self, layer: Layer) -> list[_Way]:
        return [self._way(layer, path) for path in layer.paths]

    def _way(self, layer: Layer, path: Path) -> _Way:
        splits, placement = self.placement.splits, self.placement
        flow = flow_of(path, splits.get(path.source), splits[layer.name])
        sender = placement.place_of(path.source) if path.source in splits else None
        sized = any(p.port == "size" for p in layer.paths)
        return _Way(
            flow,
            distances(flow, placement.mesh, sender, placement.place_of(layer.name)),
            self.plan.units.get(path.source, 1),
            path.kind in ("conv", "linear") or (path.kind == "sum" and sized),
            path.source in self.plan.pixels,
            _counts_messages(layer, path),
        )

    # --- one chunk ---

    def add(self, result: EngineResult) -> None:
        trace = dict(result.trace)
        images = len(result.logits)
        self._add_engine(result.events)
        for node in self.network.layers.values():
            if node.kind == "Readout" and node.name.endswith(SUMS):
                trace[node.name] = self._sums(node, trace)
        self.clock.start(images)
        dark = np.ones((self.steps * images, self.placement.cores), np.bool_)
        received: dict[str, Array] = {}
        sent: dict[str, Array] = {
            name: np.zeros((self.steps * images, events.tiles), np.int64)
            for name, events in self.layers.items()
        }
        work: dict[str, dict[str, Array]] = {}
        for name, layer in self.network.layers.items():
            received[name], work[name] = self._arrive(layer, trace, images, sent)
        for name, layer in self.network.layers.items():
            self._own(layer, trace, images, work[name])
            self._close(layer, work[name], received[name], sent[name], images, dark)
        self.core_dark += dark.sum(axis=0)
        self.clock.finish()
        self.images += images
        self.open_tokens += result.average_tokens * images
        self.classes.append(result.classes)

    def _add_engine(self, events: EventCounts | None) -> None:
        assert events is not None  # counting is on
        for node in events.nodes:
            counts = {name: node.sum(name) for name in FIELDS}
            layer = self.layers.get(node.name)
            if node.orders and layer is not None:  # the order that was placed
                chosen = int(node.orders[layer.order].sops.sum())
                counts.update(dict.fromkeys(("sops", "acs", "unrolled_acs"), chosen))
            owner = self.layer_of.get(node.name, node.name)
            for name, value in counts.items():
                self.engine[owner, name] = self.engine.get((owner, name), 0) + value

    def _sums(self, layer: Layer, trace: Mapping[str, Array]) -> Array:
        """Sums of a Readout, sent once an image, at its last step: [T, B, D]."""
        (path,) = layer.data_paths
        values = values_of(path, self.network, trace).astype(np.int64)
        over = (0, 3) if path.grid.maps else (0, 2)
        total = values.sum(axis=over)
        if path.flatten:
            total = values.sum(axis=0).reshape(values.shape[1], -1)
        out = np.zeros((self.steps, *total.shape), np.int64)
        out[-1] = total
        return out

    def _arrive(
        self, layer: Layer, trace: Mapping[str, Array], images: int, sent: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Messages into a layer: received [M, tiles], and operations by field [M, tiles]."""
        events = self.layers[layer.name]
        moments = self.steps * images
        received = np.zeros((moments, events.tiles), np.int64)
        work = {name: np.zeros((moments, events.tiles), np.int64) for name in FIELDS}
        for way in self.ways[layer.name]:
            counts = self._messages(way, trace, images)
            flow, path = way.flow, way.flow.path
            ways = flow.on_ways(counts[tallies.MESSAGES])
            arrived = flow.received(ways).reshape(moments, -1)
            received += arrived
            if path.kind == "control":
                events.counts["control"] += arrived.sum(axis=0)
            if path.source in sent:
                sent[path.source] += flow.sent(ways, sent[path.source].shape[1])
            self._travel(events, way, ways)
            if way.counted and not (layer.kind == "Readout" and path.kind == "linear"):
                work["messages"][:, 0] += _read(way, counts[tallies.MESSAGES])
            self._operate(layer, way, counts, work)
        return received, work

    def _travel(self, events: LayerEvents, way: _Way, ways: Array) -> None:
        each = ways.sum(axis=0)
        east_west = int((each * way.distance.east_west).sum())
        north_south = int((each * way.distance.north_south).sum())
        events.east_west += east_west
        events.north_south += north_south
        if way.flow.path.kind == "control":
            before = events.control_hops
            events.control_hops = before[0] + east_west, before[1] + north_south
        events.crossings += int((each * way.distance.crossings).sum())
        self.clock.travel(way.flow.path, ways > 0, way.distance)

    def _operate(self, layer: Layer, way: _Way, counts: Array, work: dict[str, Array]) -> None:
        """Synaptic operations of a path, by tile."""
        kind = way.flow.path.kind
        if kind not in ("conv", "linear", "pool", "same", "sum"):
            return
        if kind == "same" and layer.kind not in ("Add", "Gate"):
            return  # a Merge counts its own; what a LIF takes from a relay is no synapse
        moments = counts.shape[1]
        met = way.flow.meeting(counts[tallies.MESSAGES]).reshape(moments, -1)
        graded = len(counts) > 1
        work["sops"] += met
        if layer.kind == "Readout" and kind == "linear":
            work["macs"] += met
            work["unrolled_acs"] += met
            return
        if layer.kind == "Gate":
            work["acs"] += met
            work["unrolled_acs"] += met
            return
        macs = np.zeros_like(met)
        if graded and way.pixels and way.multiplied:
            macs = met
        elif graded and way.multiplied:
            macs = way.flow.meeting(counts[tallies.GRADED]).reshape(moments, -1)
        work["macs"] += macs
        work["acs"] += met - macs
        unrolled = way.flow.meeting(counts[tallies.UNROLLED]) if graded else met
        work["unrolled_acs"] += unrolled.reshape(moments, -1)

    def _messages(self, way: _Way, trace: Mapping[str, Array], images: int) -> Array:
        """Counts int64 [1 or 3, M, segments, positions] of what a path carries."""
        flow, path = way.flow, way.flow.path
        if path.kind == "control":
            changed = _changes(trace[path.trace])
            return changed.reshape(1, self.steps * images, 1, -1).astype(np.int64)
        if path.source.endswith(SUMS):
            values = trace[path.source][:, :, None, :]
        else:
            values = values_of(path, self.network, trace)
        gate = gate_of(path, self.network, trace)
        values = values.reshape(self.steps * images, *values.shape[2:])
        columns = 1 if values.dtype == np.bool_ else 3
        out = np.zeros((columns, len(values), flow.segments, flow.positions), np.int64)
        if path.flatten:
            values = values.reshape(len(values), -1, 1)
            tallies.tally_maps(values, flow.segment_of, way.unit, out)
        elif path.grid.maps:
            tallies.tally_maps(values, flow.segment_of, way.unit, out)
        else:
            held = np.zeros((0, values.shape[1]), np.bool_)
            if gate is not None:
                held = np.ascontiguousarray(gate.reshape(len(values), -1))
            tallies.tally_tokens(values, held, flow.segment_of, way.unit, out)
        return out

    # --- what a layer does itself ---

    def _own(
        self, layer: Layer, trace: Mapping[str, Array], images: int, work: dict[str, Array]
    ) -> None:
        moments, split = self.steps * images, self.placement.splits[layer.name]
        size = split.sizes[None]
        if layer.kind == "Readout":
            self._own_readout(layer, work, size, images)
            return
        if layer.kind in ("Conv", "Linear", "HaltingScore"):
            return
        values = trace[layer.name]
        flat = values.reshape(moments, *_two(layer))
        active = _by_tile(flat, split)
        if layer.kind == "LIF":
            gated = self._gated(layer, trace, split, moments)
            idle = self._idle(layer, trace, split, moments)
            work["spikes"] += active
            work["updates_gated"] += gated
            work["updates_idle"] += idle
            work["updates_active"] += size - gated - idle
            return
        work["updates_active"] += active
        work["updates_idle"] += size - active
        if layer.kind == "OrPool":
            work["spikes"] += active
        elif layer.kind == "Attention":
            gated = self._gated(layer, trace, split, moments)
            work["updates_idle"] -= gated
            work["updates_gated"] += gated
            self._attend(layer, trace, split, moments, work)
        elif layer.kind == "Gate":
            work["gate_closings"] += self._closings(layer, trace, split, moments)
        elif layer.kind == "Merge":
            self._merge(layer, trace, split, images, work)

    def _own_readout(self, layer: Layer, work: dict[str, Array], size: Array, images: int) -> None:
        if layer.name.endswith(SUMS):
            work["updates_active"] += size
        else:
            work["updates_active"][-images:] += size

    def _gated(self, layer: Layer, trace: Mapping[str, Array], split: Split, moments: int) -> Array:
        """Updates that a closed gate prevents, [M, tiles]."""
        if layer.gate is None:
            return np.zeros((moments, split.tiles), np.int64)
        closed = trace[trace_name(*layer.gate)].reshape(moments, -1) == 0
        rows = np.zeros((moments, split.rows), np.int64)
        np.add.at(rows.T, split.row_of, closed.T)
        return (rows[:, :, None] * split.column_sizes).reshape(moments, -1)

    def _idle(self, layer: Layer, trace: Mapping[str, Array], split: Split, moments: int) -> Array:
        """Updates that change nothing, [M, tiles]: only neurons without bias can idle."""
        if layer.name not in self.idle:
            return np.zeros((moments, split.tiles), np.int64)
        idle = _idle_neurons(self.graph, self.plan, layer, trace, self.idle[layer.name])
        return _by_tile(idle.reshape(moments, *_two(layer)), split)

    def _closings(
        self, layer: Layer, trace: Mapping[str, Array], split: Split, moments: int
    ) -> Array:
        now = trace[layer.name] != 0
        alive = next((p for p in layer.paths if p.port == "alive"), None)
        first = np.ones_like(now[:1]) if alive is None else trace[alive.trace][:1] != 0
        closing = np.concatenate([first, now[:-1]]) & ~now
        return _by_tile(closing.reshape(moments, -1, 1), split)

    def _attend(
        self,
        layer: Layer,
        trace: Mapping[str, Array],
        split: Split,
        moments: int,
        work: dict[str, Array],
    ) -> None:
        q, k, v = (
            np.ascontiguousarray(values_of(path, self.network, trace)).reshape(
                moments, *values_of(path, self.network, trace).shape[2:]
            )
            for path in layer.data_paths
        )
        gate = np.zeros((0, layer.grid.positions), np.bool_)
        if layer.gate is not None:
            gate = np.ascontiguousarray(
                trace[trace_name(*layer.gate)].reshape(moments, -1).astype(np.bool_)
            )
        out = np.zeros((3, moments, split.rows, split.columns), np.int64)
        width = layer.grid.channels // layer.heads
        _ORDERS[self.layers[layer.name].order](
            q, k, v, gate, width, split.row_of, split.column_of, out
        )
        additions = (out[0] + out[1]).reshape(moments, -1)
        for name in ("sops", "acs", "unrolled_acs"):
            work[name] += additions
        work["repeats"] = out[2].reshape(moments, -1)

    def _merge(
        self,
        layer: Layer,
        trace: Mapping[str, Array],
        split: Split,
        images: int,
        work: dict[str, Array],
    ) -> None:
        """Similarities at the image's first step, and what is combined at every step."""
        node = self.graph[layer.node]
        assert isinstance(node, Merge)
        ports = {path.port: path for path in layer.paths if path.kind == "control"}
        stream_path, *key_path = layer.data_paths
        stream = values_of(stream_path, self.network, trace)
        compared = values_of(key_path[0], self.network, trace) if key_path else stream
        if node.similarity != "keys":
            compared = stream
        if node.assignment == "first":
            compared = compared[:1]
        alive_before, size_before = np.ones((images, split.layer.grid.positions), bool), 1
        if "alive" in ports:
            alive_before = trace[ports["alive"].trace][0] != 0
        if "size" in ports:
            size_before = trace[ports["size"].trace][0]
        alive_after = trace[f"{layer.node}:alive"][0] != 0
        size_after = trace[f"{layer.node}:size"][0]
        gate = next(
            p for p in layer.paths if p.kind == "control" and _is_gate(self.graph, layer, p)
        )
        found = compared != 0
        eligible = (trace[gate.trace][0] != 0) & alive_before & found.any(axis=(0, 3))
        elements = _by_tile_of(found.sum(axis=0) * eligible[..., None], split)
        partners = eligible[:, 1::2].sum(axis=1)
        even = np.zeros_like(eligible)
        even[:, 0::2] = True
        paired = _by_tile_of(found.sum(axis=0) * (eligible & even)[..., None], split)
        products = elements + paired * partners[:, None]
        giver = alive_before & ~alive_after
        involved = giver | (size_after > size_before)
        combined = (stream != 0) & involved[None, :, :, None]
        moved = _by_tile(combined.reshape(-1, *combined.shape[2:]), split)
        work["messages"] += moved
        work["messages"][:images] += elements
        for name in ("sops", "macs", "unrolled_acs"):
            work[name] += moved
            work[name][:images] += products
        merges = np.zeros((images, split.rows, split.columns), np.int64)
        np.add.at(merges[:, :, 0].T, split.row_of, giver.T)
        work["merges"][:images] += merges.reshape(images, -1)

    # --- closing a chunk ---

    def _close(
        self,
        layer: Layer,
        work: dict[str, Array],
        received: Array,
        sent: Array,
        images: int,
        dark: Array,
    ) -> None:
        events = self.layers[layer.name]
        for name, values in work.items():
            events.counts[name] += values.sum(axis=0)
        events.counts["received"] += received.sum(axis=0)
        events.counts["sent"] += sent.sum(axis=0)
        busy = work["updates_active"] + work["updates_idle"] + received
        if layer.kind in ("Conv", "Linear", "HaltingScore"):
            busy = received + sent
        events.counts["dark"] += (busy == 0).sum(axis=0)
        core = self.placement.packing.core_of[layer.name]
        for tile in range(events.tiles):
            dark[:, core[tile]] &= busy[:, tile] == 0
        self.clock.work(layer, work, received, sent)

    def result(self) -> PlacedEvents:
        gateable = np.zeros(self.placement.cores, np.bool_)
        for layer in self.network.layers.values():
            if layer.gate is not None:
                gateable[self.placement.packing.core_of[layer.name]] = True
        return PlacedEvents(
            tuple(self.layers.values()),
            self.images,
            self.steps,
            self.open_tokens / self.images,
            self.engine,
            self.core_dark,
            gateable,
            self.clock.result(),
            np.concatenate(self.classes),
        )


# --- helpers ---


def _counts_messages(layer: Layer, path: Path) -> bool:
    """Whether the engine counts what a path brings as messages; a Merge counts its own."""
    if path.kind == "control" or layer.kind == "Merge":
        return False
    return not (layer.kind == "LIF" and path.kind == "same")


def _two(layer: Layer) -> tuple[int, int]:
    """The two axes of a layer's value behind time and image: channels first for maps."""
    if layer.grid.maps:
        return layer.grid.channels, layer.grid.positions
    return layer.grid.positions, layer.grid.channels


def _by_tile(active: Array, split: Split) -> Ints:
    """Non-zero values [M, ., .] by tile, int64 [M, tiles]."""
    out = np.zeros((len(active), split.rows, split.columns), np.int64)
    tallies.tally_tiles(
        np.ascontiguousarray(active), split.row_of, split.column_of, split.layer.grid.maps, out
    )
    return out.reshape(len(active), -1)


def _by_tile_of(amounts: Array, split: Split) -> Ints:
    """Sums of [M, N, D] by tile, int64 [M, tiles]."""
    rows = np.zeros((split.rows, *amounts.shape[::2]), np.int64)
    np.add.at(rows, split.row_of, np.swapaxes(amounts, 0, 1))
    tiles = np.zeros((split.columns, *rows.shape[:2]), np.int64)
    np.add.at(tiles, split.column_of, np.moveaxis(rows, 2, 0))
    return tiles.transpose(2, 1, 0).reshape(len(amounts), -1)


def _changes(values: Array) -> npt.NDArray[np.bool_]:
    """Where a number per token differs from the step before; tokens start open and of size 1."""
    before = np.concatenate([np.ones_like(values[:1]), values[:-1]])
    return values != before


def _read(way: _Way, messages: Array) -> Array:
    """Messages that the node reads at all, int64 [M]."""
    if way.flow.path.kind != "score":
        return messages.sum(axis=(1, 2))
    return messages[:, way.flow.fan.sum(axis=1) > 0].sum(axis=(1, 2))


def _is_gate(graph: Graph, layer: Layer, path: Path) -> bool:
    return any(
        edge.target_port == "gate" and (edge.source, edge.source_port) == (path.source, path.port)
        for edge in graph.into(layer.node)
    )


def _input_of_idle(graph: Graph, layer: Layer) -> str:
    """What the engine must record to tell which neurons idle; "" if none can."""
    node = graph[layer.node]
    if not isinstance(node, LIF) or node.constants is None or node.constants.bias.all():
        return ""
    edge = graph.into(node.name, "in")[0]
    return trace_name(edge.source, edge.source_port)


def _idle_neurons(
    graph: Graph, plan: Plan, layer: Layer, trace: Mapping[str, Array], source: str
) -> npt.NDArray[np.bool_]:
    """Neurons without input, state or bias, bool [T, B, ...]: those without bias are run again."""
    node = graph[layer.node]
    assert isinstance(node, LIF)
    assert node.constants is not None
    constants = node.constants
    bare = np.flatnonzero(constants.bias == 0)
    axis = 2 if layer.grid.maps else -1
    arriving = np.take(trace[source], bare, axis=axis)
    if layer.grid.maps and arriving.ndim != 5:
        raise PlacementError(f"{layer.label}: its input has shape {list(arriving.shape)}")
    steps = len(trace[layer.name])
    memory = not (
        constants.du == DECAY_UNITY - 1
        and constants.dv in (0, DECAY_UNITY // 2)
        and plan.bound_into(node.name, "in").magnitude <= ACTIVATION_LIMIT
    )
    gate = np.ones((steps, 1, 1), np.bool_)
    if layer.gate is not None:
        gate = trace[trace_name(*layer.gate)].astype(np.bool_)[..., None]
    current = np.zeros(arriving.shape[1:], np.int32)
    voltage = np.zeros(arriving.shape[1:], np.int32)
    out = np.zeros(trace[layer.name].shape, np.bool_)
    for t in range(steps):
        now = arriving[t % len(arriving)]
        still = (now == 0) & (voltage == 0)
        if memory:
            still &= current == 0
        step = lif_step(current, voltage, now, constants, 0)
        open_now = np.broadcast_to(_like(gate[t], layer, now), now.shape)
        idle = still & open_now
        if layer.grid.maps:
            out[t][:, bare] = idle
        else:
            out[t][..., bare] = idle
        current = np.where(open_now, step.current, current)
        voltage = np.where(open_now, step.voltage, voltage)
    return out


def _like(gate: Array, layer: Layer, values: Array) -> Array:
    """A gate [B, N, 1] beside values [B, N, D]; without a gate, anything."""
    return gate if layer.gate is not None else np.ones((1,) * values.ndim, np.bool_)
