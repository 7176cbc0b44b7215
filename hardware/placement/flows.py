"""How the messages of a path travel from the tiles that send to the tiles that read.

A message goes to every core that needs it (multicast on the chips that this models is a message per
target core). Whether a tile needs it depends on its position and on its channel apart, so counts of
messages by position and by *segment* of channels are all that is needed. A segment holds channels
of one sending column that meet the same readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from hardware.placement.layers import Network, Path, channel_classes, position_fan
from hardware.placement.mesh import Mesh
from hardware.placement.split import Ints, Split

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Flow:
    """The geometry of one path.

    Attributes:
        path: the path. target: split of the layer that reads.
        segment_of: segment of each source channel (of each element, if flattened).
        sender: of each segment, the sending column (if flattened, the sending tile).
        fan: int64 [segments, target columns], channels of the column that a message meets.
        reach: csr [target rows, source positions], positions of the row that a message meets.
        pair_sender, pair_reader: sending row and target row of each pair of rows that meet.
        pair_of: csr [pairs, source positions], 1 where a position's messages make that way.
        source_columns: columns of the sending layer; 1 for the image.
    """

    path: Path
    target: Split
    segment_of: Ints
    sender: Ints
    fan: Ints
    reach: sp.csr_matrix
    pair_sender: Ints
    pair_reader: Ints
    pair_of: sp.csr_matrix
    source_columns: int

    @property
    def segments(self) -> int:
        return len(self.sender)

    @property
    def positions(self) -> int:
        return 1 if self.path.flatten else self.path.grid.positions

    def tiles_sending(self) -> Ints:
        """Sending tile of each segment and pair, int64 [segments, pairs]."""
        if self.path.flatten:
            return np.broadcast_to(self.sender[:, None], (self.segments, len(self.pair_sender)))
        return self.pair_sender[None] * self.source_columns + self.sender[:, None]

    def on_ways(self, messages: Floats | Ints) -> npt.NDArray:
        """Messages [..., segments, positions] by pair of rows: [..., segments, pairs]."""
        return _apply(self.pair_of, messages)

    def meeting(self, messages: Ints) -> Ints:
        """Synaptic operations of messages [M, segments, positions]: int64 [M, rows, columns]."""
        met = _apply(self.reach, messages)
        return np.einsum("msr,sc->mrc", met, self.fan)

    def received(self, on_ways: npt.NDArray) -> npt.NDArray:
        """Messages that reach each target tile, of [M, segments, pairs]: [M, rows, columns]."""
        rows = self._by(self.pair_reader, self.target.rows)
        return np.einsum("msr,sc->mrc", on_ways @ rows, (self.fan > 0).astype(on_ways.dtype))

    def sent(self, on_ways: npt.NDArray, tiles: int) -> npt.NDArray:
        """Messages that each sending tile sends, of [M, segments, pairs]: [M, tiles]."""
        copies = (self.fan > 0).sum(axis=1).astype(on_ways.dtype)
        each = (on_ways * copies[:, None]).reshape(len(on_ways), -1)
        return each @ self._by(self.tiles_sending().reshape(-1), tiles)

    @staticmethod
    def _by(group: Ints, groups: int) -> npt.NDArray[np.int64]:
        out = np.zeros((len(group), groups), np.int64)
        out[np.arange(len(group)), group] = 1
        return out


def _apply(matrix: sp.csr_matrix, messages: npt.NDArray) -> npt.NDArray:
    *lead, positions = messages.shape
    flat = messages.reshape(-1, positions)
    return np.ascontiguousarray((matrix @ flat.T).T).reshape(*lead, -1)


def flow_of(path: Path, source: Split | None, target: Split) -> Flow:
    """Geometry of a path between two splits; `source` None: the image."""
    classes, fan = channel_classes(path, target.column_of, target.columns)
    columns = source.columns if source else 1
    if path.flatten:
        sender_of = _tiles_of_elements(path, source)
    elif source is None or path.port != "out":
        sender_of = np.zeros(path.grid.channels, np.int64)
    else:
        sender_of = source.column_of
    kinds, segment_of = np.unique(sender_of * len(fan) + classes, return_inverse=True)
    reach = position_fan(path, target.row_of, target.rows)
    sources = 1 if path.flatten else path.grid.positions
    row_of = np.zeros(sources, np.int64)
    if source is not None and not path.flatten:
        row_of = source.row_of
    reader, position = reach.nonzero()
    pairs, pair = np.unique(row_of[position] * target.rows + reader, return_inverse=True)
    ones = np.ones(len(position), np.int64)
    pair_of = sp.csr_matrix((ones, (pair, position)), shape=(len(pairs), sources))
    return Flow(
        path,
        target,
        segment_of.astype(np.int64),
        kinds // len(fan),
        fan[kinds % len(fan)],
        reach,
        pairs // target.rows,
        pairs % target.rows,
        pair_of,
        columns,
    )


def _tiles_of_elements(path: Path, source: Split | None) -> Ints:
    """Sending tile of each element of a flattened source, channel by channel."""
    if source is None:
        return np.zeros(path.grid.channels * path.grid.positions, np.int64)
    tiles = source.row_of[None, :] * source.columns + source.column_of[:, None]
    if path.grid.maps:
        return tiles.reshape(-1)
    return tiles.T.reshape(-1)


def flows_of(network: Network, splits: Mapping[str, Split]) -> Iterator[Flow]:
    """All paths, in the order of the layers."""
    for layer in network.layers.values():
        for path in layer.paths:
            yield flow_of(path, splits.get(path.source), splits[layer.name])


# --- distances ---


@dataclass(frozen=True, eq=False)
class Distances:
    """How far the messages of a flow go, each [segments, pairs], summed over the reading columns.

    Attributes:
        east_west, north_south: hops. crossings: borders between chips.
        farthest: the largest hops of any one message, east-west and north-south, and crossings.
    """

    east_west: Ints
    north_south: Ints
    crossings: Ints
    farthest: tuple[Ints, Ints, Ints]


def distances(flow: Flow, mesh: Mesh, source_place: Ints | None, target_place: Ints) -> Distances:
    """Hops of each message by XY routing.

    Args:
        source_place: place of each sending tile; None: the image enters at the first tile.
        target_place: place of each reading tile.
    """
    tiles = flow.tiles_sending()
    at = np.zeros_like(tiles) if source_place is None else source_place[tiles]
    to = target_place.reshape(flow.target.rows, flow.target.columns)[flow.pair_reader]
    reads = (flow.fan > 0)[:, None, :]
    dx = np.abs(mesh.x[at][..., None] - mesh.x[to][None]) * reads
    dy = np.abs(mesh.y[at][..., None] - mesh.y[to][None]) * reads
    chips_x = mesh.x // mesh.columns
    chips_y = mesh.y // mesh.rows
    cross = (
        np.abs(chips_x[at][..., None] - chips_x[to][None])
        + np.abs(chips_y[at][..., None] - chips_y[to][None])
    ) * reads
    wide = [part.astype(np.int64) for part in (dx, dy, cross)]
    return Distances(
        wide[0].sum(axis=2),
        wide[1].sum(axis=2),
        wide[2].sum(axis=2),
        (wide[0].max(axis=2), wide[1].max(axis=2), wide[2].max(axis=2)),
    )
