"""Cut layers into tiles that each fit a core: channel-major, token-major, or the better per layer.

A tile is some positions times some channels of a layer. What it needs:

* neurons: its positions times its channels;
* synapse memory: the weights of its channels once, whatever the number of positions, since a
  convolution or a Linear over tokens uses the same weights at all of them. Each source channel has
  a list of weights, and lists take whole words. Sums, pools and relays share one word a path. An
  attention keeps its table (or its scores), a halting score its look-up table;
* in-axons: one for each source position and path (the channel travels in the message). What an
  attention or a Readout's sum takes may also come by one for each channel (the token travels in the
  message), since neither has weights: whichever is fewer;
* out-axons: for each of its positions and each tile that reads it, the profile's slots.

Layers are cut from the last to the first, because out-axons depend on who reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.graph import Conv
from hardware.errors import PlacementError
from hardware.events import SCORES_FIRST
from hardware.placement.layers import (
    Layer,
    Network,
    Path,
    channel_classes,
    position_fan,
)
from hardware.profile import Profile

Strategy = Literal["channel-major", "token-major"]
STRATEGIES: tuple[Strategy, ...] = ("channel-major", "token-major")
RESOURCES = ("neurons", "synapse words", "in-axons", "out-axons")
NEURONS, WORDS, IN_AXONS, OUT_AXONS = range(4)
Ints = npt.NDArray[np.int64]

_LOOKUP_BITS = 16
_MERGE_BITS = 8
_TRIES = 4
"""Cuts along the other axis that are tried to leave less of a core unused."""


@dataclass(frozen=True)
class CoreLimits:
    """What a core holds, in the order of `RESOURCES`; infinite where a profile says nothing."""

    capacity: tuple[float, float, float, float]
    word_bits: int
    axon_slots: int
    delay: float
    weight_bits: float
    graded_bits: float

    @property
    def array(self) -> npt.NDArray[np.float64]:
        return np.array(self.capacity)


def core_limits(profile: Profile) -> CoreLimits:
    """The limits of a chip's cores.

    Raises:
        PlacementError: the profile is not that of a chip with cores.
    """
    limits = profile.limits
    if profile.kind != "chip" or limits.neurons_per_core is None:
        raise PlacementError(
            f"profile '{profile.name}' has no cores to place on: it is a {profile.kind} without "
            "limits.neurons_per_core; take a chip (`atsnn-export profiles` lists them)"
        )

    def of(quantity: object, default: float) -> float:
        return default if quantity is None else quantity.range[0]  # pyright: ignore[reportAttributeAccessIssue]

    word_bits = int(of(limits.synapse_word, 8))
    memory = of(limits.synapse_memory_per_core, math.inf) * 8 / word_bits
    return CoreLimits(
        (
            of(limits.neurons_per_core, math.inf),
            memory if math.isinf(memory) else math.floor(memory),
            of(limits.in_axons_per_core, math.inf),
            of(limits.out_axons_per_core, math.inf),
        ),
        word_bits,
        int(of(limits.out_axon_slots, 1)),
        of(limits.delay_steps, math.inf),
        of(limits.weight_bits, math.inf),
        of(limits.graded_spike_bits, math.inf),
    )


@dataclass(frozen=True, eq=False)
class Split:
    """A layer cut into rows of positions times columns of channels.

    Attributes:
        row_of: row of each position, int64 [P]. column_of: column of each channel, int64 [C].
        order: of an attention: name of the order of its product.
    """

    layer: Layer
    strategy: Strategy
    row_of: Ints
    column_of: Ints
    rows: int
    columns: int
    order: str = ""

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def row_sizes(self) -> Ints:
        return np.bincount(self.row_of, minlength=self.rows)

    @property
    def column_sizes(self) -> Ints:
        return np.bincount(self.column_of, minlength=self.columns)

    @property
    def sizes(self) -> Ints:
        """Neurons of each tile, int64 [tiles], rows first."""
        return np.outer(self.row_sizes, self.column_sizes).reshape(-1)


def cut(
    layer: Layer,
    strategy: Strategy,
    rows: int,
    columns: int,
    ranks: Ints | None = None,
    order: str = "",
) -> Split:
    """Cut a layer into nearly equal parts.

    Args:
        ranks: place of each position in the order that rows are cut from; None: as they come.
    """
    positions, channels = layer.grid.positions, layer.grid.channels
    place = np.arange(positions) if ranks is None or len(ranks) != positions else ranks
    return Split(
        layer,
        strategy,
        place * rows // positions,
        np.arange(channels) * columns // channels,
        rows,
        columns,
        order,
    )


# --- what tiles need ---


def needs(split: Split, network: Network, readers: Mapping[str, Split], limits: CoreLimits) -> Ints:
    """Resources of each tile, int64 [tiles, 4] in the order of `RESOURCES`.

    Args:
        readers: splits of the layers that read this one, by name; one that is missing is whole.
    """
    out = np.zeros((split.rows, split.columns, 4), np.int64)
    out[..., NEURONS] = np.outer(split.row_sizes, split.column_sizes)
    out[..., WORDS] = synapse_words(split, limits)
    for path in split.layer.paths:
        out[..., IN_AXONS] += _in_axons(path, split)
    out[..., OUT_AXONS] = limits.axon_slots * _out_axons(split, network, readers)
    return out.reshape(-1, 4)


def worst_needs(
    split: Split, network: Network, readers: Mapping[str, Split], limits: CoreLimits
) -> Ints:
    """The most that any tile needs of each resource, int64 [4]: `needs(...).max(axis=0)`."""
    in_axons = sum((_in_axons(path, split) for path in split.layer.paths), np.zeros((1, 1), int))
    return np.array(
        [
            split.row_sizes.max() * split.column_sizes.max(),
            synapse_words(split, limits).max(initial=0),
            in_axons.max(),
            limits.axon_slots * _out_axons(split, network, readers).max(initial=0),
        ],
        np.int64,
    )


def synapse_words(split: Split, limits: CoreLimits) -> Ints:
    """Words of synapse memory, int64 [rows or 1, columns]: most do not depend on the row."""
    words = np.zeros((1, split.columns), np.int64)
    for path in split.layer.data_paths:
        words = words + _path_words(path, split, limits.word_bits)[None]
    layer = split.layer
    if layer.table_bits:
        words = words + _attention_words(split, limits.word_bits)
    if layer.lookup:
        words = words + -(-layer.lookup * _LOOKUP_BITS // limits.word_bits)
    if layer.kind == "Merge":
        words = words + -(-split.row_sizes * _MERGE_BITS // limits.word_bits)[:, None]
    return words


def _path_words(path: Path, split: Split, word_bits: int) -> Ints:
    """Words of the weights that each column holds of a path, int64 [columns]."""
    bits = split.layer.weight_bits
    if path.kind == "conv":
        assert isinstance(path.synapse, Conv)
        inputs, window = path.synapse.weight.shape[1], math.prod(path.synapse.weight.shape[2:])
        _, fan = channel_classes(path, split.column_of, split.columns)
        return (inputs * -(-fan * window * bits // word_bits)).sum(axis=0)
    if path.kind == "linear":
        inputs = path.grid.channels * (path.grid.positions if path.flatten else 1)
        return inputs * -(-split.column_sizes * bits // word_bits)
    return np.ones(split.columns, np.int64)


def _attention_words(split: Split, word_bits: int) -> Ints:
    """Of the heads' tables [d, d], or of the scores [own tokens, N] of every head."""
    layer = split.layer
    width = layer.grid.channels // layer.heads
    head_of = np.arange(layer.grid.channels) // width
    held = np.zeros((layer.heads, split.columns), np.int64)
    np.add.at(held, (head_of, split.column_of), 1)
    if split.order != SCORES_FIRST:
        return -(-(width * held).sum(axis=0) * layer.table_bits // word_bits)[None]
    bits = max(8, math.ceil(math.log2(width + 1)))
    scores = np.outer(split.row_sizes * layer.grid.positions, (held > 0).sum(axis=0))
    return -(-scores * bits // word_bits)


def _in_axons(path: Path, split: Split) -> Ints:
    """Source positions that reach each tile by a path, int64 [rows, columns] or [rows, 1]."""
    if path.flatten and path.kind == "same":
        own = np.minimum(split.column_sizes, path.grid.positions)
        return np.broadcast_to(own[None], (split.rows, split.columns))
    if path.flatten:
        return np.full((split.rows, 1), path.grid.positions)
    fan = position_fan(path, split.row_of, split.rows)
    positions = np.diff(fan.indptr)[:, None].astype(np.int64)
    if path.kind not in ("query", "table", "sum"):
        return positions
    classes, meets = channel_classes(path, split.column_of, split.columns)
    channels = np.bincount(classes, minlength=len(meets)) @ (meets > 0)
    return np.minimum(positions, channels[None])


def _out_axons(split: Split, network: Network, readers: Mapping[str, Split]) -> Ints:
    """Pairs of a position and a tile that reads it, int64 [rows, columns]."""
    pairs = np.zeros((1, 1), np.int64)
    for path in network.readers.get(split.layer.name, ()):
        target = readers.get(path.target) or _whole(network.layers[path.target])
        pairs = pairs + _axons_of_path(path, split, target)
    return pairs


def _whole(layer: Layer) -> Split:
    return cut(layer, "channel-major", 1, 1)


def _axons_of_path(path: Path, split: Split, target: Split) -> Ints:
    classes, fan = channel_classes(path, target.column_of, target.columns)
    if path.flatten:
        return _axons_of_flat(path, split, classes, fan)
    rows_of = _rows_reading(path, target)
    rows = np.bincount(split.row_of, weights=rows_of, minlength=split.rows).astype(np.int64)
    if path.port != "out":  # per-token numbers of a Merge: its first column sends them
        first = np.zeros(split.columns, np.int64)
        first[0] = int((fan[0] > 0).sum())
        return np.outer(rows, first)
    reads = np.zeros((split.columns, len(fan)), np.int64)
    np.add.at(reads, (split.column_of, classes), 1)
    by_position = np.outer(rows, ((reads @ (fan > 0)) > 0).sum(axis=1))
    if path.kind not in ("query", "table", "sum"):
        return by_position
    per_column = (reads * (fan > 0).sum(axis=1)).sum(axis=1)
    rows_met = np.full(split.rows, target.rows)
    if path.kind == "query":
        met = np.unique(split.row_of * target.rows + target.row_of)
        rows_met = np.bincount(met // target.rows, minlength=split.rows)
    return np.minimum(by_position, np.outer(rows_met, per_column))


@functools.lru_cache(maxsize=1024)
def _rows_reading(path: Path, target: Split) -> Ints:
    """How many rows of the target each source position reaches, int64 [source positions]."""
    reached = position_fan(path, target.row_of, target.rows)
    sources = 1 if path.flatten else path.grid.positions
    return np.bincount(reached.indices, minlength=sources)


def _axons_of_flat(path: Path, split: Split, classes: Ints, fan: Ints) -> Ints:
    """A flattened source: one axon for each of its positions and column that reads it."""
    if path.kind != "same":
        return np.outer(split.row_sizes, np.full(split.columns, int((fan.sum(axis=0) > 0).sum())))
    positions = path.grid.positions
    read = classes.reshape(path.grid.channels, positions)
    pairs = np.zeros((split.rows, split.columns), np.int64)
    for column in range(split.columns):
        mine = np.sort(read[split.column_of == column], axis=0)
        tiles = 1 + (np.diff(mine, axis=0) != 0).sum(axis=0)
        pairs[:, column] = np.bincount(split.row_of, weights=tiles, minlength=split.rows)
    return pairs


# --- choosing a cut ---


def check_network(network: Network, limits: CoreLimits, profile: Profile) -> None:
    """Limits that no cut can mend: delays and bits of a weight.

    Raises:
        PlacementError: naming layer, both numbers and the mend.
    """
    for layer in network.layers.values():
        for path in layer.paths:
            if path.delay > limits.delay:
                raise PlacementError(
                    f"{layer.label}: messages from {path.source} wait {path.delay} steps, "
                    f"{profile.name} holds them for at most {limits.delay:.0f}; shorten the branch "
                    "beside it, or relay the messages through a neuron"
                )
            _check_weights(layer, path, limits, profile)


def _check_weights(layer: Layer, path: Path, limits: CoreLimits, profile: Profile) -> None:
    weight = getattr(path.synapse, "weight", None)
    if layer.kind == "Readout" or weight is None or weight.dtype.kind not in "iu":
        return
    strides_of_shape_only = not any(weight.strides)
    largest = 0 if strides_of_shape_only else int(np.abs(weight).max(initial=0))
    if largest > 2**limits.weight_bits:
        raise PlacementError(
            f"{layer.label}: its weights reach {largest}, a mixed-sign synapse of {profile.name} "
            f"holds up to {2**limits.weight_bits:.0f} ({limits.weight_bits:.0f} bits, even "
            "values); quantise with a smaller scale"
        )


def split_layer(
    layer: Layer,
    strategy: Strategy,
    network: Network,
    readers: Mapping[str, Split],
    profile: Profile,
    limits: CoreLimits,
    ranks: Ints | None = None,
    order: str = "",
) -> Split:
    """The coarsest cut of a layer whose tiles all fit a core.

    Channel-major cuts positions only where not even one channel of all of them fits; token-major
    cuts channels only where not even one position with all of them fits. An attention is cut by
    channels in the order that fills a table from all tokens, by tokens in the one that scores them.

    Raises:
        PlacementError: not even one neuron fits; names layer, resource, both numbers and the mend.
    """
    if layer.table_bits:
        strategy = "token-major" if order == SCORES_FIRST else "channel-major"
    positions, channels = layer.grid.positions, layer.grid.channels

    def tried(rows: int, columns: int) -> Split:
        return cut(layer, strategy, rows, columns, ranks, order)

    def fits(rows: int, columns: int) -> bool:
        worst = worst_needs(tried(rows, columns), network, readers, limits)
        return bool((worst <= limits.array).all())

    if not fits(positions, channels):
        _refuse(
            layer,
            worst_needs(tried(positions, channels), network, readers, limits),
            limits,
            profile,
        )
    if strategy == "channel-major":
        rows, columns = _coarsest(lambda r, c: fits(r, c), positions, channels)
    else:
        columns, rows = _coarsest(lambda c, r: fits(r, c), channels, positions)
    return tried(rows, columns)


def _coarsest(fits: Callable[[int, int], bool], minor: int, major: int) -> tuple[int, int]:
    """Cuts of the minor axis, as few as possible, and of the major axis.

    A few more cuts of the minor axis are taken where they save a tenth of the tiles.
    """
    first = _least(lambda cuts: fits(cuts, major), minor)
    best = (first, _least(lambda cuts: fits(first, cuts), major))
    more = _TRIES if first <= 2 * _TRIES else 0
    for cuts in range(first + 1, min(first + more, minor) + 1):
        other = _least(lambda many, cuts=cuts: fits(cuts, many), major)
        if cuts * other < 0.9 * best[0] * best[1]:
            best = (cuts, other)
    return best


def _least(holds: Callable[[int], bool], most: int) -> int:
    """The least of 1 ... most for which a monotone property holds."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


_MENDS = {
    "neurons": "use a chip with larger cores",
    "synapse words": "narrow the layer before it, or use fewer bits a weight",
    "in-axons": "pool the maps before it, or cut the layer before it into fewer positions",
    "out-axons": "let fewer cores read it: narrow the layers behind it, or use token-major",
}


def _refuse(layer: Layer, worst: Ints, limits: CoreLimits, profile: Profile) -> None:
    over = next(i for i in range(4) if worst[i] > limits.capacity[i])
    name = RESOURCES[over]
    raise PlacementError(
        f"{layer.label}: a core with a single neuron of it needs {worst[over]:,} {name}, a core of "
        f"{profile.name} has {limits.capacity[over]:,.0f}; {_MENDS[name]}"
    )
