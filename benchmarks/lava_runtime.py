"""The in-process Lava runtime against Lava's own: `python -m benchmarks.lava_runtime [--json]`.

The same networks, compiled by the same compiler, with the same process models. A time is the median
of `--repeats` runs; both runtimes take turns, so that a busy machine slows both. The time of steps
is that of a network which is built and has run; building, starting and stopping are in rows of
their own. Lines "of which the models alone" set the time here beside that of the models' own
`run_spk` on the same messages with nothing between them: their ratio is the share of the models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
for _name in THREADS:  # before numpy; Lava has as many OS processes as a network has processes
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from hardware.lava_runtime import InProcessRuntime  # noqa: E402

from lava.magma.core.run_conditions import RunSteps  # noqa: E402  # isort: skip  (after its shim)
from lava.magma.core.run_configs import Loihi2SimCfg  # noqa: E402  # isort: skip
from lava.proc.dense.process import Dense  # noqa: E402  # isort: skip
from lava.proc.lif.process import LIF  # noqa: E402  # isort: skip
from lava.proc.monitor.process import Monitor  # noqa: E402  # isort: skip

Row = dict[str, Any]
PEER = "Lava's own runtime"
ALONE = "the models' own run_spk"
CHAINS = ((10, 64), (10, 384), (30, 64), (30, 384))


def chain(processes: int, neurons: int, tag: str) -> list[Any]:
    """LIF, Dense, LIF, ...: an odd number of processes, one more if it is even."""
    rng = np.random.default_rng(0)
    layers: list[Any] = []
    for index in range(processes // 2 + 1):
        if index:
            dense = Dense(weights=2 * rng.integers(-12, 13, (neurons, neurons)))
            layers[-1].s_out.connect(dense.s_in)
            layers.append(dense)
        lif = neurons_of(neurons, tag, rng)
        if index:
            layers[-1].a_out.connect(lif.a_in)
        layers.append(lif)
    return layers


def neurons_of(count: int, tag: str, rng: np.random.Generator) -> Any:
    """Neurons without a memory of the current; about a tenth of them fire at a time."""
    threshold = int(6.5 * count**0.5)
    bias = rng.integers(-threshold // 2, threshold // 2 + threshold // 8, count)
    if tag == "fixed_pt":
        return LIF(shape=(count,), vth=threshold, du=4095, dv=2048, bias_mant=bias, bias_exp=6)
    return LIF(shape=(count,), vth=float(threshold), du=1.0, dv=0.5, bias_mant=bias)


@contextmanager
def running(process: Any, tag: str, ours: bool) -> Iterator[Callable[[int], None]]:
    """Build and take one step; yields a function that takes a number of steps."""
    cfg = Loihi2SimCfg(select_tag=tag)
    if ours:
        InProcessRuntime(process, cfg)
    process.run(RunSteps(1), cfg)
    try:
        yield lambda steps: process.run(RunSteps(steps))
    finally:
        process.stop()


def timed(action: Callable[[], Any]) -> float:
    """Seconds of wall-clock time."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(
    what: str, repeats: int, ours: Callable[[], Any], peer: Callable[[], Any], name: str = PEER
) -> Row:
    """Medians of both, which take turns."""
    pairs = [(timed(ours), timed(peer)) for _ in range(repeats)]
    ours_s, peer_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = round(peer_s / ours_s, 2)
    return {"what": what, "ours_s": ours_s, "peer": name, "peer_s": peer_s, "ratio": ratio}


def steps_of_chains(repeats: int, steps: int) -> Iterator[Row]:
    """Time steps, after the start."""
    for tag, name in (("fixed_pt", "fixed point"), ("floating_pt", "float")):
        for processes, neurons in CHAINS:
            nets = [chain(processes, neurons, tag) for _ in range(3)]
            what = f"{steps} steps, {len(nets[0])} processes of {neurons} neurons, {name}"
            with running(nets[0][0], tag, True) as ours:
                with running(nets[1][0], tag, False) as peer:
                    yield compare(what, repeats, lambda: ours(steps), lambda: peer(steps))
                with running(nets[2][0], tag, True):
                    alone = models_alone(nets[2], steps)
                    what += ", of which the models alone"
                    yield compare(what, repeats, lambda: ours(steps), alone, ALONE)


def models_alone(net: list[Any], steps: int) -> Callable[[], None]:
    """Runs the spiking phase of the models of a network here, with messages that it has recorded.

    The models keep their states and the layout of their arrays; what they send goes nowhere.
    """
    models = [process.runtime.model(process) for process in net]
    in_ports = [port for model in models for port in model.py_ports if hasattr(port, "recv")]
    out_ports = [port for model in models for port in model.py_ports if hasattr(port, "send")]
    heard = [record(port) for port in in_ports]
    net[0].run(RunSteps(steps))
    for port, messages in zip(in_ports, heard, strict=True):
        vars(port)["recv"] = cycle(messages).__next__
    for port in out_ports:
        vars(port)["send"] = lambda message: None

    def run() -> None:
        for _ in range(steps):
            for model in models:
                model.run_spk()

    return run


def record(port: Any) -> list[Any]:
    """A list to which every message is added that an in-port receives from now on."""
    messages, receive = [], port.recv

    def recv() -> Any:
        messages.append(receive())
        return messages[-1].copy()

    vars(port)["recv"] = recv
    return messages


def steps_with_a_monitor(repeats: int, steps: int) -> Iterator[Row]:
    """The same with a Monitor, which is one more process and brings every process a phase more."""
    for tag, name in (("fixed_pt", "fixed point"), ("floating_pt", "float")):
        for neurons in (64, 384):
            nets = [chain(10, neurons, tag) for _ in range(2)]
            for net in nets:
                Monitor().probe(net[0].v, 1 + repeats * steps)
            what = f"{steps} steps, 11 processes of {neurons} neurons and a Monitor, {name}"
            with running(nets[0][0], tag, True) as ours, running(nets[1][0], tag, False) as peer:
                yield compare(what, repeats, lambda: ours(steps), lambda: peer(steps))


def whole_runs(repeats: int, steps: int) -> Row:
    """Build, compile, run, stop."""

    def whole(ours: bool) -> None:
        with running(chain(10, 64, "fixed_pt")[0], "fixed_pt", ours) as run:
            run(steps)

    what = f"build, compile, {steps} steps and stop, 11 processes of 64 neurons"
    return compare(what, repeats, lambda: whole(True), lambda: whole(False))


def monitored(repeats: int, steps: int) -> Row:
    """A Monitor on the membrane potentials: a phase more at every step, and its data at the end."""

    def whole(ours: bool) -> None:
        first = chain(10, 64, "fixed_pt")[0]
        monitor = Monitor()
        monitor.probe(first.v, steps + 1)
        with running(first, "fixed_pt", ours) as run:
            run(steps)
            monitor.get_data()

    what = f"the same with a Monitor on 64 neurons ({64 * (steps + 1)} values)"
    return compare(what, repeats, lambda: whole(True), lambda: whole(False))


def variables(repeats: int) -> Iterator[Row]:
    """Var.get and Var.set of a weight matrix."""
    nets = [chain(2, 256, "fixed_pt") for _ in range(2)]
    with running(nets[0][0], "fixed_pt", True), running(nets[1][0], "fixed_pt", False):
        ours, peer = (net[1].weights for net in nets)
        value = ours.get()
        yield compare("Var.get of 65,536 values", repeats, ours.get, peer.get)
        yield compare(
            "Var.set of 65,536 values", repeats, lambda: ours.set(value), lambda: peer.set(value)
        )


def conditions() -> str:
    """Versions, threads, cores and load, for the report."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("lava-nc", "numpy", "greenlet"))
    return (
        f"Python {platform.python_version()}, {packages}; {os.environ[THREADS[0]]} thread for each "
        f"OS process, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    )


def rows(repeats: int, steps: int) -> Iterator[Row]:
    """All comparisons, one after the other."""
    yield from steps_of_chains(repeats, steps)
    yield from steps_with_a_monitor(repeats, steps)
    yield whole_runs(repeats, steps)
    yield monitored(repeats, steps)
    yield from variables(repeats)


def main() -> None:
    """Print the comparisons: a table, or with `--json` a list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    print(conditions(), file=sys.stderr if options.json else sys.stdout, flush=True)
    found = []
    for row in rows(options.repeats, options.steps):
        found.append(row)
        if not options.json:
            print(
                f"{row['ratio']:8.1f} x  {row['ours_s'] * 1e3:9.2f} ms, {row['peer']} "
                f"{row['peer_s'] * 1e3:9.2f} ms: {row['what']}",
                flush=True,
            )
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
