"""Run a graph on Lava in a watched child interpreter and bring its spikes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.formats import hdf5
from export.graph import Graph
from export.lava.compat import check_lava
from export.lava.network import (
    PROGRESS_FILE,
    Grain,
    Trace,
    build_network,
    check_images,
    hardware_steps,
    image_count,
    make_recorders,
    prepare,
    read_trace,
)
from export.lava.partition import partition
from export.lava.watch import STALL, WORK, job_folder, run_watched

GRAPH_FILE, IMAGES_FILE, PROBES = "graph.h5", "images.npy", "probes"


def run_lava(
    graph: Graph,
    images: npt.NDArray,
    grain: Grain = "layers",
    *,
    lava_conv: bool = False,
    timeout: float = math.inf,
    stall: float = STALL,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Run images through the Lava network of a quantised graph, with Lava's own runtime.

    Args:
        graph: quantised; scheduled here if it is not yet.
        images: raw 8-bit pixels, uint8 [B, ...], of which the upper `Input.bits` are sent; a graph
            with a 1-bit input also takes events, [T, B, ...] of 0 and 1.
        grain: `layers` (a process for each node) or `blocks` (a process for each block label).
        lava_conv: use Lava's own, slow model of `Conv`.
        timeout: seconds for the whole run; by default only a stall ends it.
        stall: seconds without a new time step after which the run is ended.
        on_progress: called with the time step and the number of time steps.

    Returns:
        By node name: bool [T, B, ...] for LIF and OrPool, uint8 [T, B, N] for Gate; and `logits`,
        float64 [B, classes] (of the Readout, or spike counts of the output neurons).

    Raises:
        LavaUnavailableError: Lava is not there; says how to get it.
        UnsupportedTargetError: the graph cannot run in a pipeline.
        LavaRunError: a process raised, died or stalled; names it. Nothing is left behind.
        DatasetError: images of the wrong shape, type or range.
    """
    check_lava()
    graph = prepare(graph)
    partition(graph)
    check_images(graph, images)
    count = image_count(graph, images)
    total = hardware_steps(graph, count)
    with job_folder() as folder:
        work = folder / WORK
        (work / PROBES).mkdir()
        hdf5.save(graph, work / GRAPH_FILE)
        np.save(work / IMAGES_FILE, images, allow_pickle=False)
        run_watched(
            "export.lava.run:run_in_child",
            {"grain": grain, "lava_conv": lava_conv},
            folder,
            timeout=timeout,
            stall=stall,
            progress_file=work / PROBES / PROGRESS_FILE,
            on_progress=None if on_progress is None else lambda step: on_progress(step, total),
        )
        return read_trace(graph, make_recorders(graph, count, work / PROBES))


def run_in_child(work: Path, grain: Grain, lava_conv: bool) -> None:
    """What the child does; the probes write while it runs."""
    graph = hdf5.load(work / GRAPH_FILE)
    images = np.load(work / IMAGES_FILE, allow_pickle=False)
    network = build_network(graph, images, grain, work / PROBES, progress=True)
    network.run(lava_conv)
