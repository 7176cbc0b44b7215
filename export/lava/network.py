"""From a quantised graph to a Lava process network, at two grains of the same network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from atsnn.errors import DatasetError
from atsnn.fixed_point import pixels_to_integers
from export.errors import LavaRunError, UnsupportedTargetError
from export.graph import Gate, Graph, Input, Node, Readout
from export.lava.compat import require_lava
from export.lava.partition import (
    TRACED_KINDS,
    check_supported,
    output_source,
    partition,
    probed,
)
from export.lava.wire import Recorder, to_wire
from export.passes.schedule import Schedule, latency
from export.shapes import shapes
from export.validation import validate

if TYPE_CHECKING:
    from lava.magma.core.process.process import AbstractProcess
    from lava.magma.core.run_configs import RunConfig

Array = npt.NDArray
Grain = Literal["layers", "blocks"]
Trace = dict[str, Array]

PROGRESS_FILE = "time_step"


@dataclass(frozen=True, eq=False)
class LavaNetwork:
    """A process network that is ready to run.

    Attributes:
        source: sends the images; running it runs the whole network.
        segments: one process for each block label, in order.
        steps: hardware time steps to run: images * T + depth.
        recorders: by node name, the files that probes write.
        grain: `layers` or `blocks`.
    """

    graph: Graph
    source: AbstractProcess
    segments: dict[str, AbstractProcess]
    steps: int
    recorders: dict[str, Recorder]
    grain: Grain

    def run_config(self, lava_conv: bool = False) -> RunConfig:
        """The run configuration of this grain.

        Args:
            lava_conv: use Lava's own model of `Conv`, which gives the same and is far slower.
        """
        from lava.magma.core.run_configs import Loihi2SimCfg
        from lava.proc.conv.process import Conv

        from export.lava.conv_model import PyConvModelMatmul

        return Loihi2SimCfg(
            select_tag="fixed_pt",
            select_sub_proc_model=self.grain == "layers",
            exception_proc_model_map=None if lava_conv else {Conv: PyConvModelMatmul},
        )

    def run(self, lava_conv: bool = False) -> None:
        """Run all images in this interpreter, unwatched: if a model raises, Lava hangs here.

        `export.lava.run.run_lava` does the same in a watched child.
        """
        from lava.magma.core.run_conditions import RunSteps

        self.source.run(RunSteps(num_steps=self.steps), self.run_config(lava_conv))

    def trace(self) -> Trace:
        """What the probes recorded, after a run.

        Returns:
            bool [T, B, ...] for each LIF and OrPool, uint8 [T, B, N] for each Gate, and `logits`,
            float64 [B, classes]: of the Readout, or the spike counts of the output neurons.

        Raises:
            LavaRunError: a probe's file does not hold the whole run.
        """
        return read_trace(self.graph, self.recorders)


def build_network(
    graph: Graph, images: Array, grain: Grain, probe_dir: Path, progress: bool = False
) -> LavaNetwork:
    """Build the Lava process network of a graph.

    Args:
        graph: quantised; scheduled here if it is not yet.
        images: raw 8-bit pixels, uint8 [B, ...], of which the upper `Input.bits` are sent; a graph
            with a 1-bit input also takes events, [T, B, ...] of 0 and 1.
        grain: `layers` (a process for each node) or `blocks` (a process for each block label).
        probe_dir: an empty folder for what the probes record.
        progress: write the current time step into `probe_dir`.

    Raises:
        LavaUnavailableError: Lava is not there.
        UnsupportedTargetError: the graph cannot run in a pipeline (see docs/lava.md).
        DatasetError: images of the wrong shape, type or range.
    """
    require_lava()
    from export.lava.processes.io.process import ImageSource
    from export.lava.processes.segment.process import Segment

    graph = prepare(graph)
    check_images(graph, images)
    count = image_count(graph, images)
    recorders = make_recorders(graph, count, probe_dir)
    entry = graph.input
    source = ImageSource(
        frames=_frames(graph, images),
        steps=graph.steps,
        progress_path=probe_dir / PROGRESS_FILE if progress else None,
        name=entry.name,
    )
    providers = {(entry.name, "out"): source.s_out}
    segments = {}
    for part in partition(graph):
        inside = {node.name: recorders[node.name] for node in part.nodes if node.name in recorders}
        segment = Segment(part=part, recorders=inside)
        for index, value in enumerate(part.sources):
            providers[value].connect(getattr(segment, f"in{index}"))
        for index, value in enumerate(part.sinks):
            providers[value] = getattr(segment, f"out{index}")
        segments[part.label] = segment
    return LavaNetwork(
        graph=graph,
        source=source,
        segments=segments,
        steps=hardware_steps(graph, count),
        recorders=recorders,
        grain=grain,
    )


def prepare(graph: Graph) -> Graph:
    """The graph, checked and scheduled.

    Raises:
        UnsupportedTargetError: it cannot run in a pipeline.
    """
    validate(graph)
    check_supported(graph)
    if not graph.depth:
        graph = Schedule()(graph)
    for node in graph.nodes:
        depth = graph.depth.get(node.name)
        if depth is None or depth < 0 or (isinstance(node, Input) and depth):
            wanted = "0" if isinstance(node, Input) else "0 or more"
            raise UnsupportedTargetError(
                f"{node.kind} {node.name} has depth {depth}, not {wanted}; run the schedule pass "
                "again"
            )
    for edge in graph.edges:
        node = graph[edge.target]
        arrives = graph.depth[edge.source] + edge.delay
        if arrives != graph.depth[node.name] - latency(node):
            raise UnsupportedTargetError(
                f"{node.kind} {node.name} has depth {graph.depth[node.name]}, but {edge.source} "
                f"reaches it at hardware step {arrives}; run the schedule pass again"
            )
    return graph


def hardware_steps(graph: Graph, images: int) -> int:
    """Time steps until the last image has left a scheduled graph: images * T + depth."""
    return images * graph.steps + max(graph.depth.values())


def image_count(graph: Graph, images: Array) -> int:
    """Number of images B of an array that `check_images` accepts."""
    return images.shape[images.ndim - 1 - len(graph.input.shape)]


def check_images(graph: Graph, images: Array) -> None:
    """Check images against the Input node.

    Raises:
        DatasetError: wrong shape, type or range.
    """
    entry = graph.input
    rank, wanted = len(entry.shape), ", ".join(map(str, entry.shape))
    events = images.ndim == rank + 2
    if images.dtype != np.uint8:
        raise DatasetError(f"images of type {images.dtype}, the network takes uint8 pixels")
    if images.ndim not in (rank + 1, rank + 2) or images.shape[-rank:] != entry.shape:
        raise DatasetError(
            f"images have shape {list(images.shape)}, the network takes uint8 [B, {wanted}]"
        )
    if image_count(graph, images) == 0:
        raise DatasetError("no images: the array of images is empty")
    if events and (entry.bits != 1 or images.shape[0] != graph.steps or images.max() > 1):
        raise DatasetError(
            f"events of shape {list(images.shape)} with values up to {images.max()}, the network "
            f"takes {entry.bits}-bit pixels for {graph.steps} time steps; only a 1-bit input takes "
            f"events, 0 and 1, [{graph.steps}, B, {wanted}]"
        )


def _frames(graph: Graph, images: Array) -> Array:
    """What the source sends: integers [T or 1, B, ...] in wire layout."""
    entry = graph.input
    events = images.ndim == len(entry.shape) + 2
    pixels = images if events else pixels_to_integers(images, entry.bits)[None]
    return np.stack([np.stack([to_wire(image) for image in step]) for step in pixels])


def make_recorders(graph: Graph, images: int, probe_dir: Path) -> dict[str, Recorder]:
    """A recorder for each probed node of a scheduled graph, by node name."""
    sizes = shapes(graph)
    return {
        node.name: Recorder(
            path=probe_dir / f"{index:04d}",
            shape=sizes[node.name, "out"],
            steps=graph.steps,
            images=images,
            depth=graph.depth[node.name],
            binary=isinstance(node, TRACED_KINDS),
        )
        for index, node in enumerate(probed(graph))
    }


def read_trace(graph: Graph, recorders: dict[str, Recorder]) -> Trace:
    """See `LavaNetwork.trace`."""
    trace: Trace = {}
    for name, recorder in recorders.items():
        try:
            values = recorder.read()
        except (OSError, ValueError) as error:
            raise LavaRunError(f"probe of {name}: {error}") from error
        node = graph[name]
        if isinstance(node, TRACED_KINDS):
            trace[name] = values.astype(np.uint8) if isinstance(node, Gate) else values
        if name == output_source(graph):
            trace["logits"] = _logits(node, values)
    return trace


def _logits(node: Node, values: Array) -> npt.NDArray[np.float64]:
    if isinstance(node, Readout):
        return values[-1].astype(np.float64) / node.scale
    return values.sum(axis=0, dtype=np.int64).astype(np.float64)
