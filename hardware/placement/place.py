"""`place(graph)`: a network on the cores of a chip, with nothing but its profile at hand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from export.graph import Graph
from export.validation import validate
from hardware.errors import PlacementError
from hardware.placement.activity import Activity, assumed, measured
from hardware.placement.flows import flow_of, flows_of
from hardware.placement.layers import Layer, Network, network_of
from hardware.placement.mesh import Mesh, arrange, in_order, mesh_for, weighted_hops
from hardware.placement.packing import Packing, lower_bounds, pack
from hardware.placement.split import (
    RESOURCES,
    STRATEGIES,
    CoreLimits,
    Ints,
    Split,
    Strategy,
    check_network,
    core_limits,
    split_layer,
)
from hardware.profile import Profile, Quantity, load_profile

Choice = Literal["channel-major", "token-major", "auto"]
Report = Callable[[str, int, int], None]
_LARGE = 10_000
"""Tiles above which only one cut of the network is put on the mesh."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Layers on cores on a mesh.

    Attributes:
        profile: the chip. strategy: as asked for. chosen: which of the three it became.
        network: layers and paths. splits: how each layer is cut. packing: tiles on cores.
        limits: of a core. mesh: places. place: place of each core, int64 [cores].
        traffic: messages per image between cores, csr float64 [cores, cores] (of the activity).
        entering: messages per image from outside, float64 [cores].
        activity: what the traffic was computed from. seconds: how long the placing took.
    """

    profile: Profile
    strategy: Choice
    chosen: str
    network: Network
    splits: Mapping[str, Split]
    packing: Packing
    limits: CoreLimits
    mesh: Mesh
    place: Ints
    traffic: sp.csr_matrix
    entering: npt.NDArray[np.float64]
    activity: Activity
    seconds: float

    @property
    def cores(self) -> int:
        return self.packing.cores

    @property
    def bounds(self) -> dict[str, int]:
        """Cores that each resource alone would need."""
        return lower_bounds(self.network, self.limits)

    @property
    def hops(self) -> float:
        """Messages times hops per image."""
        return weighted_hops(self.mesh, self.place, self.traffic, self.entering)

    @property
    def hops_in_order(self) -> float:
        """The same with the cores in the order of the network."""
        return weighted_hops(self.mesh, in_order(self.cores), self.traffic, self.entering)

    def place_of(self, layer: str) -> Ints:
        """Place of each tile of a layer, int64 [tiles]."""
        return self.place[self.packing.core_of[layer]]

    def tightest(self) -> tuple[str, float]:
        """The resource that is fullest on any core, and how full, 0 ... 1."""
        share = self.packing.used.max(axis=0) / self.limits.array
        at = int(np.argmax(share))
        return RESOURCES[at], float(share[at])

    def as_json(self) -> dict[str, Any]:
        bounds = self.bounds
        name, share = self.tightest()
        return {
            "profile": self.profile.name,
            "strategy": self.strategy,
            "chosen": self.chosen,
            "chips": self.mesh.chips,
            "cores_used": self.cores,
            "cores_lower_bound": max(bounds.values()),
            "lower_bounds": bounds,
            "violations": violations(self),
            "notes": notes(self),
            "tightest": {"resource": name, "share": share},
            "layers": [self._layer_json(layer) for layer in self.network.layers.values()],
            "traffic": {
                "hops": self.hops,
                "hops_in_order": self.hops_in_order,
                "messages": float(self.traffic.sum() + self.entering.sum()),
                "activity": f"measured on {self.activity.images} images"
                if self.activity.images
                else "assumed",
            },
            "seconds": self.seconds,
        }

    def _layer_json(self, layer: Layer) -> dict[str, Any]:
        split, wanted = self.splits[layer.name], self.packing.needs[layer.name]
        return {
            "name": layer.name,
            "kind": layer.kind,
            "source": layer.source,
            "block": layer.block,
            "strategy": split.strategy,
            "rows": split.rows,
            "columns": split.columns,
            "tiles": split.tiles,
            "neurons": layer.grid.neurons,
            "cores": sorted(set(self.packing.core_of[layer.name].tolist())),
            "largest_tile": dict(zip(RESOURCES, wanted.max(axis=0).tolist(), strict=True)),
        }

    def cores_json(self) -> list[dict[str, Any]]:
        """Used resources and place of every core."""
        layers: list[list[str]] = [[] for _ in range(self.cores)]
        for name, cores in self.packing.core_of.items():
            for core in cores.tolist():
                layers[core].append(name)
        return [
            {
                "core": core,
                "chip": int(self.mesh.chip[place]),
                "tile": [int(self.mesh.x[place]), int(self.mesh.y[place])],
                "used": dict(zip(RESOURCES, used.tolist(), strict=True)),
                "layers": held,
            }
            for core, (place, used, held) in enumerate(
                zip(self.place.tolist(), self.packing.used, layers, strict=True)
            )
        ]


def place(
    graph: Graph,
    profile: str | Profile = "loihi2",
    strategy: Choice = "auto",
    *,
    images: npt.NDArray[np.uint8] | None = None,
    activity: Activity | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> Placement:
    """Split a network's layers over cores and put the cores on a mesh. Needs no chip and no Lava.

    Args:
        graph: a scheduled graph; without images its weights are not looked at, only their shapes.
        profile: a chip's profile, its name, or the path of a YAML file.
        strategy: "channel-major" (weights once, all tokens on every core of a layer), "token-major"
            (weights repeated, a core's tokens can all halt), or "auto": each layer's cheaper one by
            its messages, unless one strategy for all of them costs less energy on the images.
        images: uint8 [B, *input shape] to measure messages on (a few dozen); None: an assumed rate.
        activity: measured messages of the same graph, instead of images.
        seed: of the search for short ways.
        progress: called with (stage, done, total).

    Raises:
        PlacementError: something does not fit; names layer, both numbers and the mend.
        ProfileError, EngineError, GraphError: see those who raise them.
    """
    if strategy not in get_args(Choice):
        raise PlacementError(f"strategy is {strategy!r}; use one of {', '.join(get_args(Choice))}")
    begin = time.monotonic()
    chip = load_profile(profile) if isinstance(profile, str) else profile
    limits = core_limits(chip)
    network = network_of(validate(graph))
    check_network(network, limits, chip)
    if activity is None:
        activity = _activity(network, images, progress)
    if strategy != "auto":
        found = _placed(network, chip, limits, _all(strategy), activity, seed, strategy, progress)
    else:
        found = _best(network, chip, limits, activity, images, seed, progress)
    return _stamped(found, strategy, time.monotonic() - begin)


def _activity(
    network: Network, images: npt.NDArray[np.uint8] | None, progress: Report | None
) -> Activity:
    if images is None:
        return assumed(network)
    return measured(
        network, images, None if progress is None else lambda d, n: progress("messages", d, n)
    )


def _stamped(found: Placement, strategy: Choice, seconds: float) -> Placement:
    return replace(found, strategy=strategy, seconds=seconds)


def _all(strategy: Strategy) -> Callable[[Layer], tuple[Strategy, ...]]:
    return lambda layer: (strategy,)


def _either(layer: Layer) -> tuple[Strategy, ...]:
    return STRATEGIES


def _best(
    network: Network,
    chip: Profile,
    limits: CoreLimits,
    activity: Activity,
    images: npt.NDArray[np.uint8] | None,
    seed: int,
    progress: Report | None,
) -> Placement:
    """The cheapest of: each layer its own, or one strategy for all.

    Of a network with more than `_LARGE` tiles only the first is tried.
    """
    candidates = [("per layer", _splits(network, chip, limits, _either, activity))]
    large = sum(split.tiles for split in candidates[0][1].values()) > _LARGE
    for strategy in () if large else STRATEGIES:
        with contextlib.suppress(PlacementError):  # the other one may fit
            splits = _splits(network, chip, limits, _all(strategy), activity)
            candidates.append((strategy, splits))
    placed = [
        _arranged(network, chip, limits, splits, activity, seed, chosen, progress)
        for chosen, splits in candidates
    ]
    if images is None or len(placed) == 1:
        return min(placed, key=predicted_energy)
    return min(placed, key=lambda candidate: _measured_energy(candidate, images))


def _measured_energy(placement: Placement, images: npt.NDArray[np.uint8]) -> float:
    """Joules per image of everything, standing by included, on these images."""
    from hardware.placement.energy import placed_cost
    from hardware.placement.measure import measure

    return placed_cost(placement, measure(placement, images)).total.middle


def _placed(
    network: Network,
    chip: Profile,
    limits: CoreLimits,
    allowed: Callable[[Layer], tuple[Strategy, ...]],
    activity: Activity,
    seed: int,
    chosen: str,
    progress: Report | None,
) -> Placement:
    splits = _splits(network, chip, limits, allowed, activity)
    return _arranged(network, chip, limits, splits, activity, seed, chosen, progress)


def _splits(
    network: Network,
    chip: Profile,
    limits: CoreLimits,
    allowed: Callable[[Layer], tuple[Strategy, ...]],
    activity: Activity,
) -> dict[str, Split]:
    """Cut the layers from the last to the first."""
    message = message_price(chip)
    splits: dict[str, Split] = {}
    for layer in reversed(list(network.layers.values())):
        ranks = _ranks(layer, activity)
        order = activity.orders.get(layer.name, "")
        cuts = [
            split_layer(layer, strategy, network, splits, chip, limits, ranks, order)
            for strategy in allowed(layer)
        ]
        splits[layer.name] = min(cuts, key=lambda s: (message * _arriving(s, activity), s.tiles))
    return {name: splits[name] for name in network.layers}


def _ranks(layer: Layer, activity: Activity) -> Ints | None:
    """Tokens that halt at about the same time lie side by side: place of each in that order."""
    found = [o for o in activity.openness.values() if len(o) == layer.grid.positions]
    if not found or layer.grid.maps:
        return None
    order = np.argsort(sum(found), kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _arriving(split: Split, activity: Activity) -> float:
    """Messages per image into all tiles of a layer, copies included."""
    total = 0.0
    for path in split.layer.paths:
        if path.flatten:
            total += float(np.sum(activity.by_position(path))) * split.columns
            continue
        flow = flow_of(path, None, split)
        ways = flow.on_ways(activity.by_segment(flow)[None])
        total += float(flow.received(ways).sum())
    return total


def message_price(chip: Profile) -> float:
    """Joules of one message that travels an average way; 1 where a profile prices none."""
    prices = chip.energy
    fixed = sum(
        q.middle for q in (prices.message_out, prices.message_in, prices.spike_within_tile) if q
    )
    hops = [q.middle for q in (prices.hop_east_west, prices.hop_north_south) if q]
    return fixed + 3 * sum(hops) / 2 or 1.0


def predicted_energy(placement: Placement) -> float:
    """Joules per image of the messages and hops of the activity.

    Synaptic operations and neuron updates are the same wherever they happen.
    """
    prices, flows = placement.profile.energy, placement.traffic
    messages = float(flows.sum() + placement.entering.sum())

    def joules(quantity: Quantity | None) -> float:
        return 0.0 if quantity is None else quantity.middle

    fixed = joules(prices.message_out) + joules(prices.message_in)
    fixed += joules(prices.spike_within_tile)
    hop = (joules(prices.hop_east_west) + joules(prices.hop_north_south)) / 2
    if not fixed and not hop:
        return messages + placement.hops
    return messages * fixed + placement.hops * hop


def _arranged(
    network: Network,
    chip: Profile,
    limits: CoreLimits,
    splits: Mapping[str, Split],
    activity: Activity,
    seed: int,
    chosen: str,
    progress: Report | None,
) -> Placement:
    packing = pack(network, splits, limits)
    traffic, entering = core_traffic(network, splits, packing, activity)
    mesh = mesh_for(chip, packing.cores)
    where = arrange(
        mesh,
        traffic,
        entering,
        seed,
        None if progress is None else lambda done, total: progress("mesh", done, total),
    )
    return Placement(
        chip, "auto", chosen, network, splits, packing, limits, mesh, where, traffic, entering,
        activity, 0.0,
    )  # fmt: skip


def core_traffic(
    network: Network, splits: Mapping[str, Split], packing: Packing, activity: Activity
) -> tuple[sp.csr_matrix, npt.NDArray[np.float64]]:
    """Messages per image between cores, and from outside into each core."""
    cores = packing.cores
    total = sp.csr_matrix((cores, cores))
    entering = np.zeros(cores)
    for flow in flows_of(network, splits):
        ways = flow.on_ways(activity.by_segment(flow))
        target = packing.core_of[flow.path.target]
        to = target.reshape(flow.target.rows, flow.target.columns)[flow.pair_reader]
        reads = flow.fan > 0
        segment, column = np.nonzero(reads)
        weight = ways[segment]
        reader = to[:, column].T
        if flow.path.source not in packing.core_of:
            np.add.at(entering, reader.reshape(-1), weight.reshape(-1))
            continue
        tiles = flow.tiles_sending()
        sender = packing.core_of[flow.path.source][tiles][segment]
        rows, columns, data = (x.reshape(-1) for x in (sender, reader, weight))
        total = total + sp.csr_matrix((data, (rows, columns)), shape=(cores, cores))
    return total, entering


# --- checks ---


def violations(placement: Placement) -> list[str]:
    """Limits that are exceeded, counted anew from the tiles; a placement that was made has none."""
    found = []
    used = np.zeros((placement.cores, 4), np.int64)
    for name, cores in placement.packing.core_of.items():
        np.add.at(used, cores, placement.packing.needs[name])
    for core, resource in zip(*np.nonzero(used > placement.limits.array), strict=True):
        found.append(
            f"core {core}: {used[core, resource]:,} {RESOURCES[resource]}, the limit is "
            f"{placement.limits.capacity[resource]:,.0f}"
        )
    for name, split in placement.splits.items():
        if int(split.sizes.sum()) != split.layer.grid.neurons:
            found.append(f"{name}: {split.sizes.sum()} of {split.layer.grid.neurons} neurons")
    if len(set(placement.place.tolist())) != placement.cores:
        found.append("two cores share a place on the mesh")
    return found


def notes(placement: Placement) -> list[str]:
    """What the chip does not have and the network needs; such messages are priced, not refused."""
    found = []
    if placement.limits.graded_bits == 0:
        graded = sum(layer.kind in ("Add", "Attention", "Merge", "HaltingScore")
                     for layer in placement.network.layers.values())  # fmt: skip
        if graded:
            found.append(
                f"{graded} layers send values above 1, and {placement.profile.name} has unit "
                "spikes only: each is counted as one message"
            )
    if not placement.activity.images:
        found.append(
            "messages are assumed (the same rate everywhere), not measured: give images for "
            "measured ones"
        )
    return found
