"""Put tiles on cores, and say how few cores could do.

Tiles of different layers share a core where all they need together fits. A token-major tile shares
only with tiles of the same tokens, so that the core still goes dark when these tokens halt; a
channel-major one only with channel-major ones. Two tiles of one layer never share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hardware.placement.layers import Network
from hardware.placement.split import (
    RESOURCES,
    CoreLimits,
    Ints,
    Split,
    cut,
    needs,
)

_OPEN = 256
"""Cores that are looked at for room, the latest first: sharing is meant for layers that are
near."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Which core holds each tile.

    Attributes:
        core_of: layer -> core of each tile, int64 [tiles].
        used: resources in use, int64 [cores, 4].
        needs: layer -> resources of each tile, int64 [tiles, 4].
    """

    core_of: Mapping[str, Ints]
    used: Ints
    needs: Mapping[str, Ints]

    @property
    def cores(self) -> int:
        return len(self.used)


def pack(network: Network, splits: Mapping[str, Split], limits: CoreLimits) -> Packing:
    """First fit over the latest cores, layer by layer in topological order."""
    cores = _Cores(limits)
    core_of: dict[str, Ints] = {}
    wanted: dict[str, Ints] = {}
    for name in network.layers:
        split = splits[name]
        wanted[name] = needs(split, network, splits, limits)
        cores.next_layer()
        core_of[name] = np.array(
            [
                cores.put(tile, _company(split, index // split.columns))
                for index, tile in enumerate(wanted[name])
            ],
            np.int64,
        )
    return Packing(core_of, np.array(cores.used, np.int64).reshape(-1, 4), wanted)


def _company(split: Split, row: int) -> tuple[int, int]:
    """Tiles with the same answer may share a core."""
    if split.strategy == "channel-major":
        return 0, 0
    return split.rows, row


class _Cores:
    def __init__(self, limits: CoreLimits) -> None:
        self.capacity = limits.array
        self.used: list[Ints] = []
        self.recent: dict[tuple[int, int], list[int]] = {}
        self.taken: set[int] = set()

    def next_layer(self) -> None:
        self.taken = set()

    def put(self, tile: Ints, company: tuple[int, int]) -> int:
        recent = self.recent.setdefault(company, [])
        for core in reversed(recent):
            if core not in self.taken and (self.used[core] + tile <= self.capacity).all():
                self.used[core] = self.used[core] + tile
                break
        else:
            core = len(self.used)
            self.used.append(tile)
            recent.append(core)
            del recent[:-_OPEN]
        self.taken.add(core)
        if (self.used[core] > 0.97 * self.capacity).any():
            recent.remove(core)
        return core


def lower_bounds(network: Network, limits: CoreLimits) -> dict[str, int]:
    """For each resource, the cores that no placement can do without.

    Neurons as they are; weights stored once; each source position of a path has at least one
    in-axon and one out-axon.
    """
    total = np.zeros(4, np.int64)
    for layer in network.layers.values():
        whole = cut(layer, "channel-major", 1, 1)
        total += needs(whole, network, {}, limits)[0]
    return {
        name: 0 if math.isinf(capacity) else math.ceil(needed / capacity)
        for name, needed, capacity in zip(RESOURCES, total, limits.capacity, strict=True)
    }
