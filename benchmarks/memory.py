"""Peak memory and loading time of a network, measured in an interpreter of its own.

`measure` starts `python -m benchmarks.memory`, which imports the engine but no torch, runs a small
network first, so that interpreter, libraries and compiled kernels are there already, and measures
what the network adds. The peak is `VmHWM` of /proc/self/status, reset in front of the network; the
`ru_maxrss` of getrusage would begin with the memory of the process that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import Clock, ClockName, median, timed
from export.formats import hdf5
from export.graph import Attention, Conv, Graph, Linear, Readout
from export.shapes import shapes
from hardware.engine import run

Images = npt.NDArray[np.uint8]
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Footprint:
    """What a network costs a process.

    Attributes:
        peak: bytes that loading it and running its images adds at most.
        load_s: seconds to load it from HDF5, the file in the page cache; a median.
    """

    peak: int
    load_s: float


def measure(
    graph: Graph,
    images: Images,
    small: Graph,
    small_images: Images,
    turns: int,
    clock: ClockName = ClockName.wall,
) -> Footprint:
    """Footprint of `graph` on `images`; `small` is what the interpreter runs before.

    Measured in the second of two interpreters: the first leaves the compiled kernels on disk.

    Raises:
        BenchmarkError: not on Linux, or the interpreter ends with an error; its last line is told.
    """
    if not (_STATUS.exists() and os.access(_RESET, os.W_OK)):
        raise BenchmarkError(f"peak memory needs {_STATUS} and {_RESET}, which only Linux has")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, network, pixels in (
            ("small", small, small_images),
            ("network", graph, images),
        ):
            hdf5.save(network, folder / f"{label}.h5")
            np.save(folder / f"{label}.npy", pixels)
        _in_an_interpreter(folder, 1, clock)
        return _in_an_interpreter(folder, turns, clock)


def _in_an_interpreter(folder: Path, turns: int, clock: ClockName) -> Footprint:
    command = [sys.executable, "-m", "benchmarks.memory", str(folder), str(turns), clock.value]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["nothing on stderr"]
        raise BenchmarkError(f"peak memory: the interpreter ended with an error: {lines[-1]}")
    return Footprint(**json.loads(result.stdout))


def weight_bytes(graph: Graph) -> int:
    """One byte for each weight."""
    layers = graph.of_kind(Conv, Linear, Readout)
    return sum(node.weight.size for node in layers if isinstance(node, Conv | Linear | Readout))


def activation_bytes(graph: Graph) -> int:
    """One byte for each value that goes into or out of the largest node, at all time steps."""
    sizes = shapes(graph)

    def count(ports: Iterable[tuple[str, str]]) -> int:
        return sum(int(np.prod(sizes[port], dtype=int)) for port in ports)

    largest = max(
        count((edge.source, edge.source_port) for edge in graph.into(node.name))
        + count((node.name, port) for port in node.outputs)
        for node in graph.of_kind(Conv, Linear, Attention)
    )
    return largest * graph.steps


# --- in the interpreter of its own ---


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise BenchmarkError(f"{_STATUS} has no field {field}; peak memory needs Linux 2.6 or later")


def _footprint(folder: Path, turns: int, clock: Clock) -> Footprint:
    load: Callable[[str], Graph] = lambda label: hdf5.load(folder / f"{label}.h5")  # noqa: E731
    run(load("small"), np.load(folder / "small.npy"), record="none")
    images = np.load(folder / "network.npy")
    before = _status("VmRSS")
    _RESET.write_text("5")
    run(load("network"), images, record="none")
    peak = _status("VmHWM") - before
    return Footprint(peak, median(timed(lambda: load("network"), clock) for _ in range(turns)))


def main() -> None:
    """Print the footprint of the network in a folder as JSON."""
    folder, turns, name = sys.argv[1:]
    clock = ClockName(name).clock({})
    print(json.dumps(vars(_footprint(Path(folder), int(turns), clock))))


if __name__ == "__main__":
    main()
