"""Where cores sit on the mesh of tiles and chips, and how far messages travel between them.

Chips stand in a grid as square as their number allows, and their meshes continue across the border:
a message is routed along x, then along y. The image enters at the first tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from hardware.profile import Profile

Ints = npt.NDArray[np.int64]

_MOVES = 4_000
"""Proposed moves per core at most; large networks get fewer."""
_WORK = 1e9
"""Distances that the search may evaluate."""
_COOLING = 1e-3


@dataclass(frozen=True, eq=False)
class Mesh:
    """Places for cores: chip by chip, tile by tile along x, core by core.

    Attributes:
        x, y: tile of each place over all chips, int32 [places]. chip: int32 [places].
        chips: number of chips. columns, rows: tiles of one chip. cores_per_tile.
    """

    x: npt.NDArray[np.int32]
    y: npt.NDArray[np.int32]
    chip: npt.NDArray[np.int32]
    chips: int
    columns: int
    rows: int
    cores_per_tile: int

    @property
    def places(self) -> int:
        return len(self.x)


def mesh_for(profile: Profile, cores: int) -> Mesh:
    """The smallest number of chips that has room for so many cores."""
    limits = profile.limits

    def of(quantity: object, default: int) -> int:
        return default if quantity is None else int(quantity.middle)  # pyright: ignore[reportAttributeAccessIssue]

    per_tile = of(limits.cores_per_tile, 1)
    per_chip = of(limits.cores, max(cores, 1))
    tiles = -(-per_chip // per_tile)
    columns = of(limits.mesh_columns, math.ceil(math.sqrt(tiles)))
    rows = of(limits.mesh_rows, -(-tiles // columns))
    chips = max(1, -(-cores // per_chip))
    across = math.ceil(math.sqrt(chips))
    index = np.arange(per_chip)
    tile = index // per_tile
    chip = np.repeat(np.arange(chips), per_chip)
    x = (chip % across) * columns + np.tile(tile % columns, chips)
    y = (chip // across) * rows + np.tile(tile // columns, chips)
    as_int = (x.astype(np.int32), y.astype(np.int32), chip.astype(np.int32))
    return Mesh(*as_int, chips, columns, rows, per_tile)


def weighted_hops(
    mesh: Mesh, place: Ints, traffic: sp.csr_matrix, entering: npt.NDArray[np.float64]
) -> float:
    """Messages times hops: of all pairs of cores, and of what enters at the first tile.

    Args:
        place: of each core. traffic: [cores, cores] messages. entering: [cores] messages from
            outside.
    """
    pairs = traffic.tocoo()
    a, b = place[pairs.row], place[pairs.col]
    hops = np.abs(mesh.x[a] - mesh.x[b]) + np.abs(mesh.y[a] - mesh.y[b])
    return float((pairs.data * hops).sum() + (entering * (mesh.x[place] + mesh.y[place])).sum())


def in_order(cores: int) -> Ints:
    """Cores in the order of the network, place by place: what one does without thinking."""
    return np.arange(cores)


def arrange(
    mesh: Mesh,
    traffic: sp.csr_matrix,
    entering: npt.NDArray[np.float64],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Ints:
    """Places of the cores that keep messages short: simulated annealing from the better start.

    Starts are the order of the network row by row and back and forth (a serpentine). A move swaps
    two places, one of which may be empty. Never worse than `in_order`.

    Args:
        traffic: [cores, cores] messages; direction does not matter. entering: [cores].

    Returns:
        int64 [cores].
    """
    cores = len(entering)
    both = sp.csr_matrix(traffic + traffic.T, dtype=np.float64)
    both.setdiag(0)
    both.eliminate_zeros()
    start = min(
        (in_order(cores), _serpentine(mesh)[:cores]),
        key=lambda place: weighted_hops(mesh, place, traffic, entering),
    )
    if cores < 2 or mesh.places < 2:
        return start
    moves = int(cores * min(_MOVES, max(20, _WORK / (2 * max(both.nnz, cores)))))
    place = start.astype(np.int64)
    rounds = 20
    generator = np.random.default_rng(seed)
    hot = _temperature(mesh, both, place)
    for step in range(rounds):
        temperature = hot * _COOLING ** (step / (rounds - 1))
        _anneal(
            both.indptr, both.indices, both.data, entering, mesh.x, mesh.y, place,
            moves // rounds, temperature, generator,
        )  # fmt: skip
        if progress:
            progress(step + 1, rounds)
    _anneal(
        both.indptr, both.indices, both.data, entering, mesh.x, mesh.y, place,
        moves // rounds, 0.0, generator,
    )  # fmt: skip
    best = weighted_hops(mesh, place, traffic, entering)
    return place if best < weighted_hops(mesh, start, traffic, entering) else start


def _serpentine(mesh: Mesh) -> Ints:
    """All places, chip by chip, rows of tiles alternately east and west."""
    local_x = mesh.x % mesh.columns
    local_y = mesh.y % mesh.rows
    along = np.where(local_y % 2, mesh.columns - 1 - local_x, local_x)
    across = math.ceil(math.sqrt(mesh.chips))
    chip_row, chip_column = mesh.chip // across, mesh.chip % across
    chip_along = np.where(chip_row % 2, across - 1 - chip_column, chip_column)
    return np.lexsort((along, local_y, chip_along, chip_row)).astype(np.int64)


def _temperature(mesh: Mesh, both: sp.csr_matrix, place: Ints) -> float:
    """About what a move costs at the start: a tenth of a core's weighted hops."""
    total = weighted_hops(mesh, place, both, np.zeros(len(place)))
    return 0.1 * total / max(len(place), 1)


@numba.njit(cache=True)
def _cost(indptr, indices, data, entering, x, y, place, core, at, other, other_at):
    """Weighted hops of a core if it were at `at` while core `other` is at `other_at`."""
    total = entering[core] * (x[at] + y[at])
    for i in range(indptr[core], indptr[core + 1]):
        neighbour = indices[i]
        there = other_at if neighbour == other else place[neighbour]
        total += data[i] * (abs(x[at] - x[there]) + abs(y[at] - y[there]))
    return total


@numba.njit(cache=True)
def _anneal(indptr, indices, data, entering, x, y, place, moves, temperature, generator):
    """Propose moves: to anywhere, or next to a core that it talks to."""
    cores, places = len(place), len(x)
    holder = np.full(places, -1, np.int64)
    for core in range(cores):
        holder[place[core]] = core
    for _ in range(moves):
        core = int(generator.random() * cores)
        degree = indptr[core + 1] - indptr[core]
        if degree and generator.random() < 0.5:
            friend = indices[indptr[core] + int(generator.random() * degree)]
            at = min(max(place[friend] + int(generator.random() * 17) - 8, 0), places - 1)
        else:
            at = int(generator.random() * places)
        now = place[core]
        if at == now:
            continue
        other = holder[at]
        before = _cost(indptr, indices, data, entering, x, y, place, core, now, -1, 0)
        after = _cost(indptr, indices, data, entering, x, y, place, core, at, other, now)
        if other >= 0:
            before += _cost(indptr, indices, data, entering, x, y, place, other, at, -1, 0)
            after += _cost(indptr, indices, data, entering, x, y, place, other, now, core, at)
        change = after - before
        if change <= 0 or (temperature > 0 and generator.random() < np.exp(-change / temperature)):
            place[core] = at
            holder[at] = core
            holder[now] = other
            if other >= 0:
                place[other] = now
