"""How many messages each neuron sends per image: measured, or assumed for a bare shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.graph import Merge
from hardware.engine import Engine, image_axis, select
from hardware.placement.flows import Flow
from hardware.placement.layers import Network, Path, trace_name

ASSUMED_RATE = 0.1
"""Messages per neuron and step of a network whose spikes are not known."""
CHUNK = 64
Array = npt.NDArray


@dataclass(frozen=True, eq=False)
class Activity:
    """Mean messages per image of every path.

    Attributes:
        means: path -> float64 [source positions, source channels]; empty where assumed.
        steps: T.
        images: number of images behind the means; 0: assumed.
        orders: attention layer -> order of its product that was cheaper.
        openness: gate (node, port) -> mean share of steps that each token is open, float64 [N].
        image: name of the Input node, whose pixels are assumed to be sent at every step.
    """

    means: Mapping[Path, npt.NDArray[np.float64]]
    steps: int
    images: int
    orders: Mapping[str, str]
    openness: Mapping[tuple[str, str], npt.NDArray[np.float64]]
    image: str

    def by_segment(self, flow: Flow) -> npt.NDArray[np.float64]:
        """Mean messages per image, float64 [segments, positions]."""
        mean = self.means.get(flow.path)
        if mean is None:
            per_channel = self._assumed(flow.path)
            channels = np.bincount(flow.segment_of, minlength=flow.segments)
            return np.repeat(per_channel * channels[:, None], flow.positions, axis=1).astype(float)
        values = mean.T
        if flow.path.flatten:
            values = (mean.T if flow.path.grid.maps else mean).reshape(-1, 1)
        out = np.zeros((flow.segments, values.shape[1]))
        np.add.at(out, flow.segment_of, values)
        return out

    def by_position(self, path: Path) -> npt.NDArray[np.float64] | float:
        """Mean messages per image and position, all channels."""
        mean = self.means.get(path)
        if mean is None:
            return self._assumed(path) * path.grid.channels
        return mean.sum(axis=1)

    def _assumed(self, path: Path) -> float:
        if path.kind == "control":
            return 1.0
        return self.steps * (1.0 if path.source == self.image else ASSUMED_RATE)


def assumed(network: Network) -> Activity:
    """Every neuron sends at the same rate; attention fills tables."""
    return Activity({}, network.graph.steps, 0, {}, {}, network.image)


def measured(
    network: Network,
    images: npt.NDArray[np.uint8],
    progress: Callable[[int, int], None] | None = None,
) -> Activity:
    """Run a quantised graph on some images and count what every neuron sends.

    Raises:
        EngineError: see `hardware.engine.run`.
    """
    graph = network.graph
    axis = image_axis(graph, images)
    count = images.shape[axis]
    names = recorded_names(network)
    sums: dict[Path, npt.NDArray[np.float64]] = {}
    opened: dict[tuple[str, str], npt.NDArray[np.float64]] = {}
    products: dict[str, dict[str, int]] = {}
    engine = Engine(graph)
    for start in range(0, count, CHUNK):
        part = select(images, axis, slice(start, start + CHUNK))
        result = engine.run(part, record=names)
        trace = dict(result.trace)
        for path in _data_paths(network):
            found = messages_of(path, network, trace)
            sums[path] = sums.get(path, 0) + found.sum(axis=(0, 1)).astype(float)
        for gate in _gates(network):
            opened[gate] = opened.get(gate, 0) + trace[trace_name(*gate)].mean(axis=0).sum(axis=0)
        assert result.events is not None  # counting is on
        for node in result.events.nodes:
            for order, events in node.orders.items():
                kept = products.setdefault(node.name, {})
                kept[order] = kept.get(order, 0) + int(events.sops.sum())
        if progress:
            progress(min(start + CHUNK, count), count)
    return Activity(
        {path: total / count for path, total in sums.items()},
        graph.steps,
        count,
        {name: min(orders, key=orders.__getitem__) for name, orders in products.items()},
        {gate: total / count for gate, total in opened.items()},
        network.image,
    )


def recorded_names(network: Network) -> set[str]:
    """What the engine has to record: all that is sent, and what layers give."""
    names = {path.trace for layer in network.layers.values() for path in layer.paths}
    names |= {trace_name(*gate) for gate in _gates(network)}
    names |= set(network.layers)
    for node in network.graph.of_kind(Merge):
        names |= {f"{node.name}:alive", f"{node.name}:size"}
    readouts = {layer.name for layer in network.layers.values() if layer.kind == "Readout"}
    return names - readouts


def _gates(network: Network) -> set[tuple[str, str]]:
    gates = {layer.gate for layer in network.layers.values()}
    gates |= {path.gate for layer in network.layers.values() for path in layer.paths}
    return {gate for gate in gates if gate is not None}


def _data_paths(network: Network) -> list[Path]:
    return [
        path
        for layer in network.layers.values()
        for path in layer.data_paths
        if not (layer.kind == "Readout" and path.kind == "linear")
    ]


# --- what a path carries ---


def values_of(path: Path, network: Network, trace: Mapping[str, Array]) -> Array:
    """What a path carries, [T, B, positions, channels] (maps [T, B, channels, positions]).

    Values that come a step late, and the size that weighs what a Readout adds, are in it.
    """
    values = trace[path.trace]
    steps, images = values.shape[:2]
    if path.lag:
        values = np.concatenate([np.zeros_like(values[:1]), values[:-1]])
    if path.kind == "sum":
        size = next((p for p in network.layers[path.target].paths if p.port == "size"), None)
        if size is not None:
            values = values.astype(np.int64) * trace[size.trace][..., None]
    grid = path.grid
    if grid.maps:
        return values.reshape(steps, images, grid.channels, grid.positions)
    return values.reshape(steps, images, grid.positions, grid.channels)


def gate_of(path: Path, network: Network, trace: Mapping[str, Array]) -> Array | None:
    """bool [T, B, N] of the tokens whose values are sent; None: all."""
    gate = path.gate
    if path.kind in ("query", "table"):
        gate = network.layers[path.target].gate
    return None if gate is None else trace[trace_name(*gate)].astype(np.bool_)


def messages_of(path: Path, network: Network, trace: Mapping[str, Array]) -> Array:
    """Where a message is sent, bool [T, B, positions, channels]."""
    values = values_of(path, network, trace) != 0
    if path.grid.maps:
        values = np.swapaxes(values, 2, 3)
    gate = gate_of(path, network, trace)
    return values if gate is None else values & gate[..., None]
