"""At which firing rate, token share and batch a chip needs less energy than its rival.

A model on top of measured events. With firing scaled by f and the share of open tokens by g:

* synaptic operations and messages of a layer go with f, those of attention's coincidences with f
  squared, those of pixels not at all; in the blocks all of it goes with g as well, and attention
  once more;
* active updates go with g in the blocks and do not depend on f; idle updates stay;
* static energy goes with the time of the slowest core, taken as proportional to dynamic energy
  above the barrier: never below the barrier's own time.

The chip's range is compared with the rival's: it *surely* wins where its high end is below the
rival's low end, and *may* win where its low end is below the rival's high end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hardware.energy import BEST_BATCH
from hardware.gpu import GpuWork, gpu_work, modelled
from hardware.placement.table import PlacedSystem
from hardware.profile import Profile, load_profile
from hardware.variants import open_all_gates

BATCHES = (1, 16, BEST_BATCH)
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class BreakEven:
    """One line: a chip against a rival at one batch size.

    Attributes:
        chip, rival: names of profiles; `rival` with what it computes. batch: of the rival.
        firing_sure, firing_may: firing rates (spikes per neuron and step) below which the chip
            surely wins, or may win, at the measured token share; 0: never, 1: always.
        tokens_sure, tokens_may: likewise the share of tokens at the measured firing rate.
        batch_sure, batch_may: largest batch of the rival up to which the chip surely wins, or may,
            as measured; 0: none, `LARGEST_BATCH`: that or more.
        firing, tokens: as measured.
        chip_joules, rival_joules: (low, high) as measured and modelled.
    """

    chip: str
    rival: str
    batch: int
    firing_sure: float
    firing_may: float
    tokens_sure: float
    tokens_may: float
    batch_sure: int
    batch_may: int
    firing: float
    tokens: float
    chip_joules: tuple[float, float]
    rival_joules: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True, eq=False)
class ChipModel:
    """Energy of a placed network as a function of firing rate and token share.

    Attributes:
        parts: (power of firing, power of tokens) -> joules per image (low, high) as measured.
        static: joules (low, high) as measured; barrier_share: part of it that never goes away.
        firing, tokens: as measured.
    """

    parts: dict[tuple[int, int], npt.NDArray[np.float64]]
    static: npt.NDArray[np.float64]
    barrier_share: npt.NDArray[np.float64]
    firing: float
    tokens: float

    def joules(self, firing: float, tokens: float) -> npt.NDArray[np.float64]:
        """Joules per image, (low, high)."""
        f = firing / self.firing if self.firing else 1.0
        g = tokens / self.tokens if self.tokens else 1.0
        dynamic = sum(
            (part * f**power_f * g**power_g for (power_f, power_g), part in self.parts.items()),
            np.zeros(2),
        )
        measured = sum(self.parts.values(), np.zeros(2))
        work = np.divide(dynamic, measured, out=np.ones(2), where=measured > 0)
        return dynamic + self.static * (self.barrier_share + (1 - self.barrier_share) * work)


def chip_model(system: PlacedSystem) -> ChipModel:
    """Sort the energy of a placed network by what it depends on."""
    parts: dict[tuple[int, int], npt.NDArray[np.float64]] = {}

    def add(firing: int, tokens: int, joules: tuple[float, float]) -> None:
        key = (firing, tokens)
        parts[key] = parts.get(key, np.zeros(2)) + np.array(joules)

    layers, image = system.placement.network.layers, system.placement.network.image
    for layer in system.events.layers:
        costs = system.cost.layers[layer.name]
        pixels = any(path.source == image for path in layers[layer.name].paths)
        in_block = int(layer.block.startswith("block"))
        squared = int(layer.kind == "Attention")
        fires = int(not pixels)
        powers = {"synapse": fires + squared, "message": fires, "neuron": 0, "idle": 0}
        for cause, power in powers.items():
            cost = costs[cause]
            tokens = in_block * (1 + squared * (cause == "synapse"))
            add(power, 0 if cause == "idle" else tokens, (cost.low, cost.high))
    static = system.cost.causes["static"]
    times = system.events.times
    share = np.array([_share(times.barrier[side], times.step[side]) for side in (0, 1)])
    return ChipModel(
        parts,
        np.array([static.low, static.high]),
        share,
        firing_rate(system),
        system.events.average_tokens,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def firing_rate(system: PlacedSystem) -> float:
    """Spikes per spiking neuron and step, neurons of closed tokens included."""
    spiking = [layer for layer in system.events.layers if layer.kind in ("LIF", "OrPool")]
    neurons = sum(system.placement.network.layers[layer.name].grid.neurons for layer in spiking)
    steps = neurons * system.events.steps * system.events.images
    return sum(layer.sum("spikes") for layer in spiking) / steps if steps else 0.0


def break_even(
    system: PlacedSystem,
    rivals: tuple[str | Profile, ...] = ("a100", "h100", "jetson-orin-nano", "xeon-8380"),
    batches: tuple[int, ...] = BATCHES,
) -> tuple[BreakEven, ...]:
    """A placed network against modelled GPUs and CPUs: as an SNN, and as an 8-bit ANN."""
    model = chip_model(system)
    work = _work_of_rivals(system)
    lines = []
    for rival in rivals:
        profile = load_profile(rival) if isinstance(rival, str) else rival
        for what, job in (("the same SNN", work), ("8-bit ANN", work.one_pass())):
            for batch in batches:
                lines.append(_line(system, model, profile, what, job, batch))
    return tuple(lines)


def _work_of_rivals(system: PlacedSystem) -> GpuWork:
    """A rival runs the network with all tokens: it neither gates nor merges."""
    return gpu_work(open_all_gates(system.placement.network.graph))


def _line(
    system: PlacedSystem, model: ChipModel, profile: Profile, what: str, work: GpuWork, batch: int
) -> BreakEven:
    low, high, _ = modelled(work, profile, batch)
    chip = model.joules(model.firing, model.tokens)

    def firing(side: int, against: float) -> float:
        return _largest(lambda f: float(model.joules(f, model.tokens)[side]) < against)

    def tokens(side: int, against: float) -> float:
        return _largest(lambda g: float(model.joules(model.firing, g)[side]) < against)

    return BreakEven(
        system.placement.profile.name,
        f"{profile.name}, {what}",
        batch,
        firing(1, low),
        firing(0, high),
        tokens(1, low),
        tokens(0, high),
        _largest_batch(lambda size: float(chip[1]) < modelled(work, profile, size)[0]),
        _largest_batch(lambda size: float(chip[0]) < modelled(work, profile, size)[1]),
        model.firing,
        model.tokens,
        (float(chip[0]), float(chip[1])),
        (low, high),
    )


def _largest(wins: Callable[[float], bool]) -> float:
    """The largest share in [0, 1] up to which the chip wins; 0 if it never does."""
    if wins(1.0):
        return 1.0
    if not wins(0.0):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def _largest_batch(wins: Callable[[int], bool]) -> int:
    """The largest power of 2 up to which the chip wins at every one; 0 if at none."""
    batch = 0
    for power in range(LARGEST_BATCH.bit_length()):
        if not wins(2**power):
            break
        batch = 2**power
    return batch


def plot(
    systems: tuple[PlacedSystem, ...],
    rivals: tuple[str | Profile, ...],
    path: str,
    batches: tuple[int, ...] = (1, BEST_BATCH),
) -> None:
    """Energy over firing rate, a panel for each batch: a band for each chip, bars for the rivals.

    A chip surely wins where its band lies below the foot of a rival's bar. Written as PNG, SVG or
    PDF, by the suffix of `path`.
    """
    from hardware.placement.picture import figure, save

    drawing, axes = figure(len(batches), 10.0, 5.0 * len(batches))
    rates = np.geomspace(1e-3, 1.0, 200)
    work = _work_of_rivals(systems[0])
    for axis, batch in zip(axes, batches, strict=True):
        for index, system in enumerate(systems):
            _draw_chip(axis, system, rates, f"C{index}")
        at = np.geomspace(2.2, 50, 2 * len(rivals))
        names = []
        for index, rival in enumerate(rivals):
            profile = load_profile(rival) if isinstance(rival, str) else rival
            for ann, job in enumerate((work, work.one_pass())):
                low, high, _ = modelled(job, profile, batch)
                where = at[2 * index + ann]
                axis.plot([where, where], [low, high], color="0.55" if ann else "0.2", linewidth=6)
                names.append(f"{profile.name}, {'8-bit ANN' if ann else 'SNN'}")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="firing rate (spikes per neuron and step); rivals on the right",
            ylabel="energy per image (J)",
            title=f"Chips are models in pJ; rivals at batch {batch} are modelled, with their range",
        )
        axis.set_xticks([1e-3, 1e-2, 1e-1, 1, *at], ["0.1 %", "1 %", "10 %", "100 %", *names])
        axis.tick_params(axis="x", which="minor", bottom=False)
        for label in axis.get_xticklabels()[4:]:
            label.set(rotation=40, ha="right", fontsize=7)
        axis.legend(fontsize=8, loc="upper left")
    save(drawing, path)


def _draw_chip(axis: Any, system: PlacedSystem, rates: npt.NDArray, colour: str) -> None:
    model = chip_model(system)
    band = np.array([model.joules(rate, model.tokens) for rate in rates])
    middle = np.sqrt(band[:, 0] * band[:, 1])
    name = f"{system.placement.profile.name}, tokens {model.tokens:.0%}"
    axis.fill_between(rates, band[:, 0], band[:, 1], alpha=0.2, color=colour)
    axis.plot(rates, middle, color=colour, label=name)
    measured = np.sqrt(np.prod(model.joules(model.firing, model.tokens)))
    axis.plot([model.firing], [measured], "o", color=colour)
