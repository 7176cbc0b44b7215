"""Run a quantised graph on Lava in this interpreter; the same trace as `export.lava.run_lava`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy.typing as npt
from lava.magma.core.run_conditions import RunSteps

from export.graph import Graph
from export.lava.network import Grain, Trace, build_network
from hardware.lava_runtime.runtime import InProcessRuntime


def run_graph(
    graph: Graph,
    images: npt.NDArray,
    grain: Grain = "layers",
    *,
    lava_conv: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Run images through the Lava network of a quantised graph, without an OS process.

    Args:
        graph: quantised; scheduled here if it is not yet.
        images: raw 8-bit pixels, uint8 [B, ...]; events, [T, B, ...], for a graph with a 1-bit
            input.
        grain: `layers` (a process for each node) or `blocks` (a process for each block label).
        lava_conv: use Lava's own, slow model of `Conv`.
        on_progress: called with the time step and the number of time steps, once for each image.

    Returns:
        By node name: bool [T, B, ...] for LIF and OrPool, uint8 [T, B, N] for Gate; and `logits`,
        float64 [B, classes].

    Raises:
        UnsupportedTargetError: the graph cannot run in a pipeline.
        LavaModelError, LavaDeadlockError: the network failed.
        DatasetError: images of the wrong shape, type or range.
    """
    with TemporaryDirectory(prefix="atsnn-lava-") as folder:
        network = build_network(graph, images, grain, Path(folder))
        with InProcessRuntime(network.source, network.run_config(lava_conv)) as runtime:
            for done in range(0, network.steps, graph.steps):
                runtime.run(RunSteps(min(graph.steps, network.steps - done)))
                if on_progress is not None:
                    on_progress(min(done + graph.steps, network.steps), network.steps)
        return network.trace()
