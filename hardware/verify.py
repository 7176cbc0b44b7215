"""Compare the spikes of one executor with another's: every layer, step and image.

A *stage* is an executor of the graph. `verify` compares quantised torch with the engine, and the
engine with every other stage, on the same images: all LIF, OrPool and Gate nodes at every step, and
the logits. Equality means equality of every value; one difference fails and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.graph import LIF, Gate, Graph, OrPool
from hardware.engine import Engine, image_axis, select
from hardware.errors import VerificationError

Images = npt.NDArray[np.uint8]
Trace = Mapping[str, npt.NDArray]

TORCH, ENGINE = "quantised torch", "engine"
Grain = Literal["layers", "blocks"]
LAVA_GRAINS: dict[str, Grain] = {"lava-layers": "layers", "lava-blocks": "blocks"}
IN_PROCESS_GRAINS: dict[str, Grain] = {
    f"{name}-inprocess": grain for name, grain in LAVA_GRAINS.items()
}
LOGITS = "logits"


@dataclass(frozen=True)
class Difference:
    """The first value that differs: the earliest node in the graph, then image, step and neuron.

    Attributes:
        node: name of the node, or "logits".
        image: index into the images.
        t: time step; None for logits.
        neuron: index in the node's own shape.
        values: what the first and the second stage have there.
    """

    node: str
    image: int
    t: int | None
    neuron: tuple[int, ...]
    values: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "image": self.image,
            "t": self.t,
            "neuron": list(self.neuron),
            "values": list(self.values),
        }

    def __str__(self) -> str:
        step = "" if self.t is None else f", t = {self.t}"
        a, b = self.values
        return f"{self.node}, image {self.image}{step}, neuron {list(self.neuron)}: {a:g} and {b:g}"


@dataclass(frozen=True)
class StageResult:
    """Outcome of one arrow of the chain.

    Attributes:
        from_stage, to_stage: names of the two stages.
        images: how many images were compared.
        spikes_compared: places where a spike (or gate) can be: neurons x steps x images.
        spikes_differing: how many of them differ.
        first_difference: the first of them, or of the logits; None if all are equal.
        nodes_compared: how many LIF, OrPool and Gate nodes were compared.
        nodes_missing: those that the second stage does not show (only a partial stage may).
        logits_differing: images whose logits differ.
    """

    from_stage: str
    to_stage: str
    images: int
    spikes_compared: int
    spikes_differing: int
    first_difference: Difference | None
    nodes_compared: int
    nodes_missing: tuple[str, ...] = ()
    logits_differing: int = 0

    @property
    def equal(self) -> bool:
        """True if no spike, no gate and no logit differs."""
        return self.spikes_differing == 0 and self.logits_differing == 0

    def as_json(self) -> dict[str, Any]:
        first = self.first_difference
        return {
            "from": self.from_stage,
            "to": self.to_stage,
            "images": self.images,
            "spikes_compared": self.spikes_compared,
            "spikes_differing": self.spikes_differing,
            "first_difference": first.as_json() if first else None,
            "nodes_compared": self.nodes_compared,
            "nodes_missing": list(self.nodes_missing),
            "logits_differing": self.logits_differing,
        }


@dataclass(frozen=True)
class Stage:
    """An executor of the graph.

    Attributes:
        name: how reports call it.
        trace: images uint8 [B, *input shape] -> {node name: [T, B, ...], "logits": [B, classes]}.
        partial: True if it may lack inner layers; none of ours does.
        watched: the same as `trace`, for a slow stage: also tells how far it is, 0 to 1.
    """

    name: str
    trace: Callable[[Images], Trace]
    partial: bool = False
    watched: Callable[[Images, Callable[[float], None]], Trace] | None = None


@dataclass(frozen=True)
class VerificationResult:
    """All stages; `as_json()` gives {"stages": [...]}, `equal` is the verdict."""

    stages: tuple[StageResult, ...]

    @property
    def equal(self) -> bool:
        return all(stage.equal for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        return {"stages": [stage.as_json() for stage in self.stages]}


def verify(
    graph: Graph,
    images: Images,
    against: Sequence[str | Stage] = (ENGINE, *LAVA_GRAINS),
    *,
    reference: Stage | Callable[[Images], Trace] | None = None,
    batch: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerificationResult:
    """Compare reference -> engine, then engine -> each of the other stages, spike by spike.

    Args:
        graph: the quantised graph.
        images: raw 8-bit pixels, uint8 [B, *input shape], or events, [T, B, *input shape].
        against: "engine", "lava-layers", "lava-blocks", or a `Stage` of your own; with
            "-inprocess" behind, Lava's process models run in this interpreter
            (`hardware.lava_runtime`).
        reference: what the engine is compared with; by default the graph in torch
            (`export.torch_module.torch_trace`). Not needed if "engine" is not in `against`.
        batch: images at a time; bounds the memory that the traces take.
        progress: called with (stage name, images done, images in all).

    Raises:
        VerificationError: unknown stage, no images, a stage that cannot be had or that shows other
            nodes or shapes. A difference is a result, not an error.
    """
    if not images.shape[image_axis(graph, images)]:
        raise VerificationError("no images to verify on: the array of images is empty")
    if not against:
        raise VerificationError("nothing to compare with: name at least one stage in `against`")
    if batch < 1:
        raise VerificationError(f"batch is {batch}; verify needs at least 1 image at a time")
    engine = engine_stage(graph)
    results = []
    for wanted in against:
        if wanted == ENGINE:
            pair = _reference(graph, reference), engine
        else:
            pair = engine, wanted if isinstance(wanted, Stage) else _stage(graph, wanted)
        results.append(_compare_stages(graph, images, *pair, batch, progress))
    return VerificationResult(tuple(results))


def engine_stage(graph: Graph) -> Stage:
    """The engine."""
    engine = Engine(graph)
    return Stage(ENGINE, lambda images: engine.run(images, count_events=False).trace)


def torch_stage(graph: Graph) -> Stage:
    """The graph as a torch module, halted tokens masked.

    Raises:
        VerificationError: torch is not installed.
    """
    try:
        from export.torch_module import torch_trace
    except ModuleNotFoundError as error:
        raise VerificationError(
            f"stage '{TORCH}' needs torch, which does not import here ({error}); install torch, or "
            "leave 'engine' out and compare the engine with the other stages"
        ) from error
    return Stage(TORCH, lambda images: torch_trace(graph, images))


def lava_stage(graph: Graph, grain: Grain) -> Stage:
    """The Lava network at grain "layers" or "blocks".

    Raises:
        LavaUnavailableError: Lava is not installed.
    """
    from export.lava.run import run_lava

    def watched(images: Images, tell: Callable[[float], None]) -> Trace:
        return run_lava(
            graph, images, grain=grain, on_progress=lambda step, steps: tell(step / steps)
        )

    return Stage(
        f"lava-{grain}",
        lambda images: run_lava(graph, images, grain=grain),
        watched=watched,
    )


def lava_in_process_stage(graph: Graph, grain: Grain) -> Stage:
    """The same Lava network in this interpreter.

    Raises:
        LavaUnavailableError: Lava is not installed.
    """
    from hardware.lava_runtime import run_graph

    def watched(images: Images, tell: Callable[[float], None]) -> Trace:
        return run_graph(graph, images, grain, on_progress=lambda step, steps: tell(step / steps))

    return Stage(
        f"lava-{grain}-inprocess",
        lambda images: run_graph(graph, images, grain),
        watched=watched,
    )


def _reference(graph: Graph, reference: Stage | Callable[[Images], Trace] | None) -> Stage:
    if reference is None:
        return torch_stage(graph)
    return reference if isinstance(reference, Stage) else Stage(TORCH, reference)


def _stage(graph: Graph, name: str) -> Stage:
    if name in LAVA_GRAINS:
        return lava_stage(graph, LAVA_GRAINS[name])
    if name in IN_PROCESS_GRAINS:
        return lava_in_process_stage(graph, IN_PROCESS_GRAINS[name])
    raise VerificationError(
        f"unknown stage '{name}'; choose from "
        f"{', '.join((ENGINE, *LAVA_GRAINS, *IN_PROCESS_GRAINS))}"
    )


def _compare_stages(
    graph: Graph,
    images: Images,
    first: Stage,
    second: Stage,
    batch: int,
    progress: Callable[[str, int, int], None] | None,
) -> StageResult:
    total: StageResult | None = None
    axis = image_axis(graph, images)
    count = images.shape[axis]
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        part = select(images, axis, slice(start, stop))
        result = compare(
            graph,
            first.trace(part),
            _second_trace(second, part, (start, stop, count), progress),
            names=(first.name, second.name),
            partial=second.partial,
            first_image=start,
        )
        total = result if total is None else _joined(graph, total, result)
        if progress:
            progress(second.name, stop, count)
    assert total is not None  # there is at least one image
    return total


def _second_trace(
    stage: Stage,
    part: Images,
    place: tuple[int, int, int],
    progress: Callable[[str, int, int], None] | None,
) -> Trace:
    """The trace of a part of the images, with progress from inside it where the stage tells it.

    `place`: index of the first image of the part, of the first after it, number of images in all.
    """
    if progress is None or stage.watched is None:
        return stage.trace(part)
    start, stop, count = place
    return stage.watched(
        part, lambda share: progress(stage.name, start + int(share * (stop - start)), count)
    )


def compare(
    graph: Graph,
    reference: Trace,
    other: Trace,
    *,
    names: tuple[str, str] = ("reference", "other"),
    partial: bool = False,
    first_image: int = 0,
) -> StageResult:
    """Compare two traces of the same images: LIF, OrPool and Gate nodes, and logits.

    Args:
        names: of the two stages.
        partial: the second trace may lack nodes (but not the logits).
        first_image: index of the first image, for reports.

    Raises:
        VerificationError: a node is missing or has another shape, or there is nothing to compare.
    """
    nodes = _compared_nodes(graph)
    missing = tuple(name for name in nodes if name not in other)
    _check_traces(nodes, missing, reference, other, names, partial)
    _check_images(names, reference)
    shown = [name for name in nodes if name not in missing]
    compared = differing = 0
    first: Difference | None = None
    for name in shown:
        unequal = np.asarray(reference[name]) != np.asarray(other[name])
        compared += unequal.size
        count = int(np.count_nonzero(unequal))
        differing += count
        if count and first is None:
            first = _first_spike(name, unequal, reference[name], other[name], first_image)
    logits = np.any(reference[LOGITS] != other[LOGITS], axis=1)
    if logits.any() and first is None:
        first = _first_logit(reference[LOGITS], other[LOGITS], first_image)
    return StageResult(
        *names,
        images=len(logits),
        spikes_compared=compared,
        spikes_differing=differing,
        first_difference=first,
        nodes_compared=len(shown),
        nodes_missing=missing,
        logits_differing=int(np.count_nonzero(logits)),
    )


def _compared_nodes(graph: Graph) -> list[str]:
    return [node.name for node in graph.of_kind(LIF, OrPool, Gate)]


def _check_traces(
    nodes: list[str],
    missing: tuple[str, ...],
    reference: Trace,
    other: Trace,
    names: tuple[str, str],
    partial: bool,
) -> None:
    for name in (*nodes, LOGITS):
        if name not in reference:
            raise VerificationError(f"stage '{names[0]}' shows no values of {name}")
    lacking = [name for name in (*missing, LOGITS) if name not in other]
    if lacking and (not partial or LOGITS in lacking):
        raise VerificationError(
            f"stage '{names[1]}' shows no values of {lacking[0]} "
            f"({len(lacking)} of {len(nodes) + 1} compared values are missing)"
        )
    if len(missing) == len(nodes):
        raise VerificationError(f"stage '{names[1]}' shows none of the {len(nodes)} spiking nodes")
    for name in (*nodes, LOGITS):
        if name in other and np.shape(other[name]) != np.shape(reference[name]):
            raise VerificationError(
                f"{name}: stage '{names[0]}' has shape {list(np.shape(reference[name]))}, "
                f"stage '{names[1]}' {list(np.shape(other[name]))}"
            )


def _check_images(names: tuple[str, str], reference: Trace) -> None:
    if not len(reference[LOGITS]):
        raise VerificationError(f"stage '{names[0]}' shows no images: there is nothing to compare")


def _first_spike(
    name: str, unequal: npt.NDArray, a: npt.NDArray, b: npt.NDArray, first_image: int
) -> Difference:
    image, t, *neuron = np.argwhere(np.swapaxes(unequal, 0, 1))[0].tolist()
    place = (t, image, *neuron)
    return Difference(
        name, first_image + image, t, tuple(neuron), (float(a[place]), float(b[place]))
    )


def _first_logit(a: npt.NDArray, b: npt.NDArray, first_image: int) -> Difference:
    image, index = np.argwhere(a != b)[0].tolist()
    values = (float(a[image, index]), float(b[image, index]))
    return Difference(LOGITS, first_image + image, None, (index,), values)


def _joined(graph: Graph, a: StageResult, b: StageResult) -> StageResult:
    """Results of earlier images `a` and later images `b` of the same two stages."""
    nodes = _compared_nodes(graph)
    order = {name: place for place, name in enumerate([*nodes, LOGITS])}
    lacking = {*a.nodes_missing, *b.nodes_missing}
    found = [d for d in (a.first_difference, b.first_difference) if d is not None]
    return replace(
        a,
        images=a.images + b.images,
        spikes_compared=a.spikes_compared + b.spikes_compared,
        spikes_differing=a.spikes_differing + b.spikes_differing,
        first_difference=min(found, key=lambda d: order[d.node], default=None),
        nodes_compared=len(nodes) - len(lacking),
        nodes_missing=tuple(name for name in nodes if name in lacking),
        logits_differing=a.logits_differing + b.logits_differing,
    )
