"""Event counts of a run, per node and image: what the cores would have had to do.

How things are counted (a *message* is a non-zero value that arrives at a node's input):

* Conv, Linear, OrPool, Add: one SOP per message and synapse, exact at the borders of a convolution.
  A synapse counts even if its weight is 0. An Add or OrPool is a synapse of weight 1. What a halted
  token would send into a gated Linear is not sent; its residual stream still passes the Adds.
* A pixel, and any value of the residual stream but that of a single spike (1, or 2^F with F
  fractional bits), that meets a weight is one SOP per synapse and one MAC (`macs`), or as many
  additions as it stands for spikes, rounded up (`unrolled_acs`). A single spike is one addition
  (`acs`), and so is any value where nothing is multiplied (Add, OrPool, Gate, the sum of a Readout
  without sizes). So `sops = acs + macs`.
* Pixels are sent anew at every time step, as the Lava network does it, although the engine computes
  the first layer once.
* Attention: both orders are counted, coincidences (an AND that adds one) and reads; see
  `AttentionOrder`. A node's own counts are those of the order that is cheaper over all images.
* Neuron updates: `updates_idle` are those that change nothing (no input, no state, no bias), as the
  simulator SANA-FE has it; relays (Add, OrPool, Attention, Merge) are active where their output is
  not 0.
* Merge: the similarities (every non-zero element of an eligible even token meets every eligible odd
  token, and itself for the norm) and, at every step, every non-zero element that is combined: MACs.
* Readout: tokens are summed over time first (one SOP per non-zero element and step), then each
  non-zero sum meets every class once (MAC).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

PerImage = npt.NDArray[np.int64]

FIELDS = (
    "sops",
    "acs",
    "macs",
    "unrolled_acs",
    "messages",
    "spikes",
    "updates_active",
    "updates_idle",
    "updates_gated",
    "gate_closings",
    "merges",
)
SCORES_FIRST = "(q k^T) v"
TABLE_FIRST = "q (k^T v)"


@dataclass(frozen=True)
class AttentionOrder:
    """Events of one order of the attention product, each int64 [images].

    `(q k^T) v`: every coincidence of a q and a k spike adds one to a score; every v spike reads the
    non-zero scores of its token. `q (k^T v)`: every coincidence of k and v adds one to the head's
    table; every q spike reads the non-zero entries of its row. What is read acts as a weight: one
    spike adds it once, so a read is one addition.

    Attributes:
        coincidences: additions of one.
        reads: entries read and added.
    """

    coincidences: PerImage
    reads: PerImage

    @property
    def sops(self) -> PerImage:
        """All additions, int64 [images]."""
        return self.coincidences + self.reads


@dataclass(frozen=True)
class NodeEvents:
    """Events of one node.

    Attributes:
        name, kind, source, block: as in the graph.
        dense_macs: multiplications of a dense network of the same shape, one pass, one image.
        counts: field of `FIELDS` -> int64 [images].
        orders: for Attention, both orders; `counts` has the one that is cheaper over all images.
        order: name of that order, "" for other nodes.
    """

    name: str
    kind: str
    source: str
    block: str
    dense_macs: int
    counts: Mapping[str, PerImage]
    orders: Mapping[str, AttentionOrder] = field(default_factory=dict)
    order: str = ""

    def sum(self, name: str) -> int:
        """Total of a field over all images."""
        return int(self.counts[name].sum())

    def mean(self, name: str) -> float:
        """Mean of a field per image."""
        return float(self.counts[name].mean()) if self.counts[name].size else 0.0

    def as_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "block": self.block,
            "dense_macs": self.dense_macs,
            "per_image": {name: self.mean(name) for name in FIELDS},
            "sum": {name: self.sum(name) for name in FIELDS},
        }
        if self.orders:
            record["attention"] = {
                "order": self.order,
                "sops_per_image": {
                    name: float(order.sops.mean()) for name, order in self.orders.items()
                },
                "coincidences_per_image": {
                    name: float(order.coincidences.mean()) for name, order in self.orders.items()
                },
            }
        return record


@dataclass(frozen=True)
class EventCounts:
    """Events of all nodes over the same images, in topological order."""

    nodes: tuple[NodeEvents, ...]
    images: int
    steps: int

    def __getitem__(self, name: str) -> NodeEvents:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def per_image(self, name: str) -> PerImage:
        """A field summed over all nodes, int64 [images]."""
        return sum((node.counts[name] for node in self.nodes), np.zeros(self.images, np.int64))

    def sum(self, name: str) -> int:
        """A field summed over all nodes and images."""
        return int(self.per_image(name).sum())

    def mean(self, name: str) -> float:
        """A field summed over all nodes, mean per image."""
        return float(self.per_image(name).mean()) if self.images else 0.0

    @property
    def dense_macs(self) -> int:
        """MACs of a dense network of the same shape for one image, one pass."""
        return sum(node.dense_macs for node in self.nodes)

    def group(self, key: Callable[[NodeEvents], str]) -> dict[str, EventCounts]:
        """Split by a key of the node, for example `lambda node: node.block`; order is kept."""
        groups: dict[str, list[NodeEvents]] = {}
        for node in self.nodes:
            groups.setdefault(key(node), []).append(node)
        return {
            name: EventCounts(tuple(nodes), self.images, self.steps)
            for name, nodes in groups.items()
        }

    def select(self, images: PerImage) -> EventCounts:
        """The same of some of the images, in the order of `images` (indices).

        As of a run, attention's own counts are those of the order cheaper over all images it holds.
        """
        nodes = tuple(_joined([node], images) for node in self.nodes)
        return EventCounts(nodes, len(images), self.steps)

    def as_json(self) -> dict[str, Any]:
        """Means and sums per node and in all, ready for `json.dumps`."""
        return {
            "images": self.images,
            "steps": self.steps,
            "dense_macs": self.dense_macs,
            "per_image": {name: self.mean(name) for name in FIELDS},
            "sum": {name: self.sum(name) for name in FIELDS},
            "nodes": [node.as_json() for node in self.nodes],
        }


@dataclass
class NodeCounter:
    """Collects the events of one node over one batch of images; the engine writes, nobody else."""

    images: int
    counts: dict[str, PerImage] = field(default_factory=dict)
    orders: dict[str, AttentionOrder] = field(default_factory=dict)

    def add(self, name: str, per_image: PerImage | int) -> None:
        """Add to a field; an int counts for every image."""
        if name not in self.counts:
            self.counts[name] = np.zeros(self.images, np.int64)
        self.counts[name] += per_image

    def add_order(self, name: str, order: AttentionOrder) -> None:
        """Add one more stretch of time steps to an order of the attention product."""
        before = self.orders.get(name)
        self.orders[name] = order if before is None else _added(before, order)


def _added(a: AttentionOrder, b: AttentionOrder) -> AttentionOrder:
    return AttentionOrder(a.coincidences + b.coincidences, a.reads + b.reads)


@dataclass(frozen=True)
class NodeLabel:
    """What the counts of a node are filed under."""

    name: str
    kind: str
    source: str
    block: str
    dense_macs: int


def collect(
    labels: Iterable[NodeLabel], batches: list[dict[str, NodeCounter]], steps: int
) -> EventCounts:
    """Join the counters of all batches and choose the cheaper order of every attention."""
    nodes = tuple(_node_events(label, [batch[label.name] for batch in batches]) for label in labels)
    return EventCounts(nodes, sum(_images(batch) for batch in batches), steps)


def join(parts: Sequence[EventCounts]) -> EventCounts:
    """Counts of the images of one part or more of the same nodes, one after another.

    `steps` are the most that a part has.
    """
    images = sum(part.images for part in parts)
    same = zip(*(part.nodes for part in parts), strict=True)
    nodes = tuple(_joined(node, np.arange(images)) for node in same)
    return EventCounts(nodes, images, max(part.steps for part in parts))


def _images(batch: dict[str, NodeCounter]) -> int:
    return next(iter(batch.values())).images


def _node_events(label: NodeLabel, counters: list[NodeCounter]) -> NodeEvents:
    counts = {
        name: np.concatenate(
            [c.counts.get(name, np.zeros(c.images, np.int64)) for c in counters]
            or [np.zeros(0, np.int64)]
        )
        for name in FIELDS
    }
    return _in_cheaper_order(
        NodeEvents(label.name, label.kind, label.source, label.block, label.dense_macs, counts),
        _concatenated([c.orders for c in counters]),
    )


def _joined(parts: Sequence[NodeEvents], images: PerImage) -> NodeEvents:
    """One node's events in all parts, of those images that are chosen among them."""
    counts = {name: np.concatenate([part.counts[name] for part in parts]) for name in FIELDS}
    orders = _concatenated([part.orders for part in parts])
    return _in_cheaper_order(
        replace(parts[0], counts={name: values[images] for name, values in counts.items()}),
        {
            name: AttentionOrder(order.coincidences[images], order.reads[images])
            for name, order in orders.items()
        },
    )


def _concatenated(parts: Sequence[Mapping[str, AttentionOrder]]) -> dict[str, AttentionOrder]:
    return {
        name: AttentionOrder(
            np.concatenate([orders[name].coincidences for orders in parts]),
            np.concatenate([orders[name].reads for orders in parts]),
        )
        for name in (parts[0] if parts else ())
    }


def _in_cheaper_order(node: NodeEvents, orders: Mapping[str, AttentionOrder]) -> NodeEvents:
    """The node with these orders, its own counts being those of the cheaper one."""
    if not orders:
        return node
    chosen = min(orders, key=lambda name: int(orders[name].sops.sum()))
    own = dict.fromkeys(("sops", "acs", "unrolled_acs"), orders[chosen].sops)
    return replace(node, counts={**node.counts, **own}, orders=orders, order=chosen)
