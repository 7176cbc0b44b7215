"""A user's own script around `build_network`: another process listens to a block, then all runs."""

from pathlib import Path

import numpy as np
from lava.magma.core.run_conditions import RunSteps
from lava.proc.monitor.process import Monitor

from export.formats import hdf5
from export.lava import build_network


def main(work: Path, graph: str, images: str, port: str) -> None:
    probes = work / "probes"
    probes.mkdir()
    network = build_network(hdf5.load(Path(graph)), np.load(images), "layers", probes)
    monitor = Monitor()
    monitor.probe(getattr(network.segments["stem"], port), network.steps)
    network.source.run(RunSteps(network.steps), network.run_config())
    heard = next(iter(next(iter(monitor.get_data().values())).values()))
    trace = network.trace()
    network.source.stop()
    np.savez(work / "result.npz", heard=heard, **trace)
