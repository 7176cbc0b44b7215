"""The comparison that a sceptic can check: one network in four forms on cores, and its rivals.

Every row says what computes, under which convention and grade, and what its joules are made of. A
model in picojoules never stands beside a joule meter without saying so in the same line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.graph import Gate, Graph, Merge
from export.passes import Schedule
from hardware.energy import (
    ADAPTIVE,
    ALL_TOKENS,
    ANN_CONVENTIONS,
    CONVENTIONS,
    PLAIN,
    Cost,
    EnergyRow,
    ann_row,
    gpu_rows,
    total,
)
from hardware.engine import image_axis, select
from hardware.engine.plan import dense_macs, make_plan
from hardware.errors import GpuMeasurementError
from hardware.events import EventCounts
from hardware.gpu_import import ImportedMeasurement, imported_rows
from hardware.placement.energy import PlacedCost, memory_traffic, placed_cost
from hardware.placement.measure import PlacedEvents, measure
from hardware.placement.place import Choice, Placement, place
from hardware.profile import Profile, load_profile
from hardware.variants import halt_only, merge_only, open_all_gates

Report = Callable[[str, int, int], None]
HALTING, MERGING = "SNN, halting only", "SNN, merging only"
CALIBRATION = 32
"""Images that placement decides on; the counts come from all of them."""
RIVAL_GPUS = ("a100", "h100", "jetson-orin-nano", "xeon-8380")
MODEL_NOTE = "a model in pJ, not a measurement"


@dataclass(frozen=True, eq=False)
class PlacedSystem:
    """One form of the network on one chip.

    Attributes:
        name: "SNN, all tokens", "SNN, halting only", "SNN, merging only", "SNN, adaptive tokens";
            "SNN" for a network without gates.
        placement, events, cost: what came of it.
    """

    name: str
    placement: Placement
    events: PlacedEvents
    cost: PlacedCost

    def as_json(self) -> dict[str, Any]:
        events, times = self.events, self.events.times
        return {
            "system": self.name,
            "profile": self.placement.profile.name,
            "strategy": self.placement.chosen,
            "chips": self.placement.mesh.chips,
            "cores_used": self.placement.cores,
            "average_tokens": events.average_tokens,
            "energy": self.cost.as_json(),
            "core_steps_dark": events.dark_share,
            "core_steps_dark_gateable": events.dark_share_gateable,
            "events": {
                name: events.mean(name)
                for name in (
                    "sops", "acs", "macs", "updates_active", "updates_idle", "updates_gated",
                    "spikes", "messages", "received", "control", "repeats",
                )
            },
            "hops": {"east_west": events.hops[0], "north_south": events.hops[1]},
            "chip_crossings": events.crossings,
            "memory_bytes": memory_traffic(self.placement, events),
            "step_seconds": times.step,
            "latency_seconds": times.latency,
            "images_per_second": times.images_per_second,
            "pipelined": times.pipelined,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class PlacedTable:
    """The whole comparison.

    Attributes:
        systems: the network's forms on the chip. rivals: conventions without placement, the
            quantised ANN, GPU and CPU, as rows. images: counted over how many.
        gpu_line: one line on where the GPU rows come from.
    """

    systems: tuple[PlacedSystem, ...]
    rivals: tuple[EnergyRow, ...]
    images: int
    gpu_line: str

    def as_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "gpu": self.gpu_line,
            "systems": [system.as_json() for system in self.systems],
            "rivals": [row.as_json() for row in self.rivals],
        }


def forms(graph: Graph) -> dict[str, Graph]:
    """The forms of a network that a comparison needs, scheduled anew."""
    gated = any(graph.of_kind(Gate))
    if not gated:
        return {PLAIN: graph}
    found = {ALL_TOKENS: open_all_gates(graph)}
    if any(graph.of_kind(Merge)):
        found[HALTING] = halt_only(graph)
        found[MERGING] = merge_only(graph)
    scheduled = {name: Schedule()(form) for name, form in found.items()}
    return {**scheduled, ADAPTIVE: graph}


def placed_system(
    name: str,
    graph: Graph,
    images: npt.NDArray[np.uint8],
    profile: str | Profile,
    strategy: Choice = "auto",
    progress: Report | None = None,
) -> PlacedSystem:
    """Place one form on a few of the images and count it on all.

    Raises:
        PlacementError, ProfileError, EngineError: see `place` and `measure`.
    """
    few = select(images, image_axis(graph, images), slice(0, CALIBRATION))
    placement = place(graph, profile, strategy, images=few)
    report = None if progress is None else lambda done, count: progress(name, done, count)
    events = measure(placement, images, progress=report)
    return PlacedSystem(name, placement, events, placed_cost(placement, events))


def placed_table(
    graph: Graph,
    images: npt.NDArray[np.uint8],
    *,
    profile: str | Profile = "loihi1_calibrated",
    strategy: Choice = "auto",
    gpu: Literal["auto", "modelled", "measured", "none"] = "auto",
    gpu_profiles: tuple[str, ...] = ("a100", "xeon-8380"),
    imported: tuple[ImportedMeasurement, ...] = (),
    progress: Report | None = None,
) -> PlacedTable:
    """All forms of a network on a chip's cores, beside its rivals.

    Args:
        graph: quantised and scheduled.
        images: uint8 [B, *input shape].
        profile, strategy: see `place`.
        gpu: "auto" measures where a GPU is usable, and else models; "measured" insists.
        gpu_profiles: GPUs and CPUs to model.
        imported: measurements made elsewhere.

    Raises:
        PlacementError, ProfileError, EngineError, GpuMeasurementError: see the parts.
    """
    if gpu not in ("auto", "modelled", "measured", "none"):
        raise GpuMeasurementError(f"gpu is {gpu!r}; use auto, modelled, measured or none")
    chip = load_profile(profile) if isinstance(profile, str) else profile
    figures = [load_profile(name) for name in gpu_profiles]
    systems = tuple(
        placed_system(name, form, images, chip, strategy, progress)
        for name, form in forms(graph).items()
    )
    first = next(iter(forms(graph).values()))
    rows = [row for system in systems for row in convention_rows(system)]
    dense = _dense_events(first)
    rows += [ann_row(dense, load_profile(name)) for name in ANN_CONVENTIONS]
    line = "no GPU rows were asked for"
    if gpu != "none":
        how: list[str] = []
        for at, processor in enumerate(figures):
            wanted = gpu if at == 0 else "modelled"
            found = gpu_rows(systems[0].name, first, images, wanted, processor)
            rows += found
            how += [row.note for row in found[:1]]
        line = how[0] if how else line
    rows += imported_rows(imported, float(first.steps * dense.dense_macs))
    return PlacedTable(systems, tuple(rows), systems[0].events.images, line)


def convention_rows(system: PlacedSystem) -> list[EnergyRow]:
    """The same events under the field's conventions, which price arithmetic only."""
    rows = []
    for name in CONVENTIONS:
        cost = total(
            placed_cost(system.placement, system.events, load_profile(name)).causes[cause]
            for cause in ("synapse", "neuron")
        )
        rows.append(_row(system, load_profile(name), cost))
    return rows


def _row(system: PlacedSystem, profile: Profile, cost: Cost) -> EnergyRow:
    return EnergyRow(
        system.name,
        profile.convention,
        cost.grade,
        cost.middle,
        system.events.mean("sops"),
        system.events.mean("macs"),
        cost.low,
        cost.high,
        "conventions price arithmetic only: no memory, no messages, no idle power",
    )


def _dense_events(graph: Graph) -> EventCounts:
    """Only the dense MACs of a graph."""
    from hardware.events import NodeEvents

    plan = make_plan(graph)
    nodes = tuple(
        NodeEvents(node.name, node.kind, node.source, "", dense_macs(plan, node), {})
        for node in graph.nodes
    )
    return EventCounts(nodes, 0, graph.steps)
