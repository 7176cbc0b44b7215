"""Energy per image of a network, system by system, each under its named convention.

Counts are exact; prices are not. So every row carries the convention that its joules follow and a
grade, the weakest grade among the prices in it. Joules of different conventions must not be
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.graph import Graph
from hardware.engine import image_axis, run
from hardware.errors import GpuMeasurementError, ProfileError
from hardware.events import EventCounts
from hardware.gpu import GpuMeasurement, GpuWork, gpu_work, measure_graph, modelled
from hardware.profile import Grade, Profile, Quantity, load_profile, weakest
from hardware.variants import open_all_gates

CONVENTIONS = ("45nm-fp32", "45nm-int8", "spikformer-77fj")
"""Profiles of the field's conventions, always shown beside the chip."""
ANN_CONVENTIONS = ("45nm-fp32", "45nm-int8")
PLAIN, ALL_TOKENS, ADAPTIVE = "SNN", "SNN, all tokens", "SNN, adaptive tokens"
ANN = "quantised ANN of the same shape"
BEST_BATCH = 256


@dataclass(frozen=True)
class Cost:
    """Energy per image in joules, as a range, and the weakest grade among its prices."""

    low: float
    high: float
    grade: Grade

    @property
    def middle(self) -> float:
        """The energy; of a range, its geometric middle."""
        return self.low if self.low == self.high else math.sqrt(self.low * self.high)

    def __add__(self, other: Cost) -> Cost:
        grade = weakest([self.grade, other.grade])
        return Cost(self.low + other.low, self.high + other.high, grade)


FREE = Cost(0.0, 0.0, "measured")


@dataclass(frozen=True)
class EnergyRow:
    """One line of the energy table.

    Attributes:
        system: what computes: "SNN, all tokens", "SNN, adaptive tokens" ("SNN" where the network
            has no gates), the ANN of the same shape, or one of them on a GPU.
        convention: the prices used; joules of different conventions must not be compared.
        grade: the weakest grade among those prices; of a measurement, "measured".
        joules_per_image: energy of one image; where only a range is known, its geometric middle.
        sops, macs: synaptic operations and multiplications of one image that the row prices.
        joules_low, joules_high: the range; equal where the prices are single numbers.
        note: what else must be known, or "".
    """

    system: str
    convention: str
    grade: Grade
    joules_per_image: float
    sops: float
    macs: float
    joules_low: float
    joules_high: float
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "convention": self.convention,
            "grade": self.grade,
            "joules_per_image": self.joules_per_image,
            "sops": self.sops,
            "macs": self.macs,
            "joules_low": self.joules_low,
            "joules_high": self.joules_high,
            "note": self.note,
        }


@dataclass(frozen=True)
class EnergyTable:
    """Rows of the table; `as_json()` gives the list of rows.

    Attributes:
        rows: the rows, in print order.
        images: number of images that the events were counted over.
        average_tokens: of the adaptive graph, mean over images of open gates / (L * T * N).
        all_tokens, adaptive: the event counts behind the rows (`adaptive` is the same object as
            `all_tokens` if the graph has no gates).
    """

    rows: tuple[EnergyRow, ...]
    images: int
    average_tokens: float
    all_tokens: EventCounts
    adaptive: EventCounts

    def as_json(self) -> list[dict[str, Any]]:
        return [row.as_json() for row in self.rows]


def energy_table(
    graph: Graph,
    images: npt.NDArray[np.uint8],
    *,
    profile: str = "loihi1",
    gpu: Literal["auto", "modelled", "measured", "none"] = "auto",
    gpu_profile: str = "a100",
    progress: Callable[[int, int], None] | None = None,
) -> EnergyTable:
    """Run the adaptive graph and its all-tokens form, count events, and price them.

    Args:
        graph: a quantised graph.
        images: raw 8-bit pixels, uint8 [B, *input shape], or events, [T, B, *input shape].
        profile: name of a shipped chip profile, or path of a YAML file.
        gpu: "auto" measures by NVML where a GPU is usable and else models it from `gpu_profile`;
            "measured" insists; "none" leaves the GPU out.
        gpu_profile: name of a shipped GPU profile, or path of a YAML file.
        progress: called with (images done, images in all), both runs together.

    Raises:
        EngineError: see `hardware.engine.run`.
        ProfileError: unknown or incomplete profile, or one of the wrong kind.
        GpuMeasurementError: gpu is "measured" and there is no usable GPU.
    """
    if gpu not in ("auto", "modelled", "measured", "none"):
        raise GpuMeasurementError(f"gpu is {gpu!r}; use auto, modelled, measured or none")
    chip, gpu_figures = (
        _profile(profile, ("chip", "convention")),
        _profile(gpu_profile, ("gpu", "cpu")),
    )
    dense_graph = open_all_gates(graph)
    gated = len(dense_graph.nodes) < len(graph.nodes)
    count = images.shape[image_axis(graph, images)]
    reports = _progress_of_runs(progress, count, 1 + gated)
    all_tokens, average = _count(dense_graph, images, reports[0])
    adaptive = all_tokens
    if gated:
        adaptive, average = _count(graph, images, reports[1])
    system = ALL_TOKENS if gated else PLAIN
    rows = [
        *_spiking_rows(system, all_tokens, chip),
        *(_spiking_rows(ADAPTIVE, adaptive, chip) if gated else ()),
        *(ann_row(all_tokens, load_profile(name)) for name in ANN_CONVENTIONS),
        *gpu_rows(system, dense_graph, images, gpu, gpu_figures),
    ]
    return EnergyTable(tuple(rows), count, average, all_tokens, adaptive)


Report = Callable[[int, int], None]


def _progress_of_runs(report: Report | None, images: int, runs: int) -> list[Report | None]:
    """One callback for each of several runs over the same images, which together count on."""

    def of_run(report: Report, index: int) -> Report:
        return lambda done, _: report(index * images + done, runs * images)

    return [None if report is None else of_run(report, index) for index in range(runs)]


def _count(
    graph: Graph, images: npt.NDArray[np.uint8], progress: Report | None
) -> tuple[EventCounts, float]:
    """Events and average tokens."""
    result = run(graph, images, record="none", progress=progress)
    assert result.events is not None  # counting is on
    return result.events, result.average_tokens


def _profile(name: str, kinds: tuple[str, ...]) -> Profile:
    profile = load_profile(name)
    if profile.kind not in kinds:
        raise ProfileError(
            f"profile '{name}' is a {profile.kind}, but a {' or '.join(kinds)} is wanted here"
        )
    return profile


# --- prices of events ---


def price(
    events: EventCounts, profile: Profile, graded: Literal["once", "unrolled"] = "once"
) -> dict[str, Cost]:
    """Energy per image by cause, mean over the images.

    Args:
        events: what was counted.
        profile: a chip or a convention.
        graded: how a message with a value above 1 is priced where there is one price for all
            synaptic operations: once, or as so many unit messages.

    Returns:
        What the profile prices of "synaptic operations" and "convolution operations", or of
        "additions" and "multiplications"; of "active neuron updates", "idle neuron updates" and
        "spikes".
    """
    prices = profile.energy
    if prices.synaptic_operation:
        field = "sops" if graded == "once" else "unrolled_acs"
        convolved = 0.0
        if prices.convolution_operation:
            convolved = sum(node.mean(field) for node in events.nodes if node.kind == "Conv")
        causes = [
            ("synaptic operations", events.mean(field) - convolved, prices.synaptic_operation),
            ("convolution operations", convolved, prices.convolution_operation),
        ]
    else:
        causes = [
            ("additions", events.mean("acs"), prices.accumulate),
            ("multiplications", events.mean("macs"), prices.multiply_accumulate),
        ]
    causes += [
        ("active neuron updates", events.mean("updates_active"), prices.neuron_update_active),
        ("idle neuron updates", events.mean("updates_idle"), prices.neuron_update_idle),
        ("spikes", events.mean("spikes"), prices.spike),
    ]
    return {cause: cost_of(count, each) for cause, count, each in causes if each is not None}


def cost_of(count: float, quantity: Quantity) -> Cost:
    """So many events at so much each."""
    low, high = quantity.range
    return Cost(count * low, count * high, quantity.grade)


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs."""
    return sum(costs, FREE)


def by_layer(
    events: EventCounts, profile: Profile, graded: Literal["once", "unrolled"] = "once"
) -> dict[str, Cost]:
    """Energy per image of each node, in the order of the graph."""
    layers = events.group(lambda node: node.name)
    return {name: total(price(part, profile, graded).values()) for name, part in layers.items()}


def _spiking_rows(system: str, events: EventCounts, chip: Profile) -> list[EnergyRow]:
    rows = [spiking_row(system, events, load_profile(name)) for name in CONVENTIONS]
    if chip.name not in CONVENTIONS:
        rows.append(spiking_row(system, events, chip))
    bits = chip.limits.graded_spike_bits
    if bits is not None and bits.middle == 0:
        rows.append(spiking_row(system, events, chip, "unrolled"))
    return rows


def spiking_row(
    system: str,
    events: EventCounts,
    profile: Profile,
    graded: Literal["once", "unrolled"] = "once",
) -> EnergyRow:
    """The network's events under one profile."""
    cost = total(price(events, profile, graded).values())
    unrolled = graded == "unrolled"
    note = (
        "chip rows are without traffic between cores, which needs a placement"
        if profile.kind == "chip"
        else ""
    )
    return EnergyRow(
        system,
        profile.convention + (", graded spikes as unit spikes" if unrolled else ""),
        cost.grade,
        cost.middle,
        events.mean("unrolled_acs" if unrolled else "sops"),
        0.0 if unrolled else events.mean("macs"),
        cost.low,
        cost.high,
        note,
    )


def ann_row(events: EventCounts, profile: Profile) -> EnergyRow:
    """A dense network of the same shape: one pass, every multiplication done.

    Raises:
        ProfileError: the profile has no price of a MAC.
    """
    price_of_mac = profile.energy.multiply_accumulate
    if price_of_mac is None:
        raise ProfileError(f"profile '{profile.name}' has no price for multiply_accumulate")
    cost = cost_of(events.dense_macs, price_of_mac)
    return EnergyRow(
        ANN,
        profile.convention,
        cost.grade,
        cost.middle,
        0.0,
        float(events.dense_macs),
        cost.low,
        cost.high,
        "the ANN is one dense pass, multiplications only",
    )


# --- GPUs ---


def gpu_rows(
    system: str, graph: Graph, images: npt.NDArray[np.uint8], gpu: str, profile: Profile
) -> list[EnergyRow]:
    """The dense network on a GPU or CPU: measured where wanted and possible, else modelled.

    Args:
        system: what computes, for the first column.
        gpu: "auto", "measured", "modelled" or "none".
        profile: of the GPU or CPU that is modelled.
    """
    if gpu == "none":
        return []
    work = gpu_work(graph)
    problem = ""
    rows: list[EnergyRow] = []
    if gpu != "modelled" and profile.kind == "gpu":
        try:
            rows = [
                measured_row(measure_graph(graph, images, batch), work, batch, system)
                for batch in (1, BEST_BATCH)
            ]
        except GpuMeasurementError as error:
            if gpu == "measured":
                raise
            problem = str(error)
    if not rows:
        rows = [modelled_row(work, profile, batch, system, problem) for batch in (1, BEST_BATCH)]
    return [*rows, modelled_row(work.one_pass(), profile, BEST_BATCH, ANN, problem)]


def modelled_row(
    work: GpuWork, profile: Profile, batch: int, system: str, problem: str = ""
) -> EnergyRow:
    """The dense network on a GPU, from a roofline; `problem` says why it was not measured."""
    low, high, grade = modelled(work, profile, batch)
    cost = Cost(low, high, grade)
    return EnergyRow(
        f"{system}, on a {profile.kind.upper()}, batch {batch}",
        f"{profile.convention} (modelled)",
        grade,
        cost.middle,
        0.0,
        float(work.macs),
        low,
        high,
        f"modelled: {problem}" if problem else "modelled",
    )


def measured_row(measurement: GpuMeasurement, work: GpuWork, batch: int, system: str) -> EnergyRow:
    """A measurement by NVML; total energy of the board, idle power included."""
    energies = [window.total_joules_per_image for window in measurement.windows]
    return EnergyRow(
        f"{system}, on a GPU, batch {batch}",
        f"{measurement.device}, NVML, total board energy (measured)",
        "measured",
        measurement.total_joules_per_image,
        0.0,
        float(work.macs),
        min(energies),
        max(energies),
        f"dynamic {measurement.dynamic_joules_per_image:.3g} J, "
        f"idle {measurement.idle_watts:.1f} W, {len(energies)} windows, spread "
        f"{measurement.spread:.1%}; the graph in torch, exact integers included, which a network "
        "built for speed would not need",
    )
