"""From a scheduled, quantised graph to a Lava process network, at two grains of the same network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from export.errors import LavaRunError, UnsupportedTargetError
from export.graph import Graph, Input, Output, Readout
from export.lava.compat import require_lava
from export.lava.partition import check_supported, latency, partition, probed
from export.lava.wire import Recorder, to_wire
from export.shapes import shapes

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
        images: integers below 2^bits of the Input node, [B, ...], or [T, B, ...] for events.
        grain: `layers` (a process for each node) or `blocks` (a process for each block label).
        probe_dir: an empty folder for what the probes record.
        progress: write the current time step into `probe_dir`.

    Raises:
        LavaUnavailableError: Lava is not there.
        UnsupportedTargetError: the graph cannot run in a pipeline (see docs/lava.md).
        ValueError: images of the wrong shape or range.
    """
    require_lava()
    from export.lava.processes.io.process import ImageSource
    from export.lava.processes.segment.process import Segment

    graph = prepare(graph)
    entry = input_node(graph)
    events = check_images(entry, images, graph.steps)
    recorders = make_recorders(graph, images.shape[1 if events else 0], probe_dir)
    source = ImageSource(
        images=_images_on_wire(images, len(entry.shape)),
        steps=graph.steps,
        events=events,
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
        steps=hardware_steps(graph, next(iter(recorders.values())).images),
        recorders=recorders,
        grain=grain,
    )


def prepare(graph: Graph) -> Graph:
    """The graph, checked and scheduled.

    Raises:
        UnsupportedTargetError: it cannot run in a pipeline.
    """
    from export.lava.timing import schedule
    from export.validation import validate

    validate(graph)
    check_supported(graph)
    if not graph.depth:
        graph = schedule(graph)
    for edge in graph.edges:
        node = graph[edge.target]
        if isinstance(node, Output):
            continue
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


def input_node(graph: Graph) -> Input:
    """The one Input node of a valid graph."""
    node = next(graph.of_kind(Input))
    assert isinstance(node, Input)
    return node


def check_images(entry: Input, images: Array, steps: int) -> bool:
    """Check images against the Input node; True if they have a time axis.

    Raises:
        ValueError: wrong shape, kind or range.
    """
    wanted = f"[B, {', '.join(map(str, entry.shape))}]"
    rank = len(entry.shape)
    events = images.ndim == rank + 2 and images.shape[0] == steps
    if images.shape[-rank:] != entry.shape or not (events or images.ndim == rank + 1):
        raise ValueError(f"images have shape {list(images.shape)}, the network takes {wanted}")
    if not images.shape[1 if events else 0]:
        raise ValueError("there are no images")
    if images.dtype.kind not in "bui":
        raise ValueError(f"images are {images.dtype}, the network takes integers")
    if int(images.min()) < 0 or int(images.max()) >= 2**entry.bits:
        raise ValueError(
            f"images reach from {images.min()} to {images.max()}, the network takes 0 to "
            f"{2**entry.bits - 1} (atsnn.fixed_point.pixels_to_integers)"
        )
    return events


def _images_on_wire(images: Array, rank: int) -> Array:
    flat = images.reshape(-1, *images.shape[images.ndim - rank :])
    on_wire = np.stack([to_wire(image) for image in flat])
    return on_wire.reshape(*images.shape[: images.ndim - rank], *on_wire.shape[1:])


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
            binary=not isinstance(node, Readout),
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
        if isinstance(node, Readout):
            trace["logits"] = values[-1].astype(np.float64) / node.scale
        else:
            trace[name] = values.astype(np.uint8) if node.kind == "Gate" else values
    if "logits" not in trace:
        output = next(graph.of_kind(Output))
        (edge,) = graph.into(output.name)
        spikes = trace[edge.source]
        trace["logits"] = spikes.sum(axis=0).reshape(spikes.shape[1], -1).astype(np.float64)
    return trace
