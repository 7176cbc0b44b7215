"""The engine against PyTorch: `python -m benchmarks.engine [--json]`.

Peer: eager float inference of the same network with all tokens, at the best of a few batch sizes;
once as PyTorch alone runs it, once with the package's own fused neurons. A time is the median of
`--repeats` runs over all images of a row; ours and the peer take turns.
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
from importlib.metadata import version
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from atsnn import neurons
from atsnn.config import ModelConfig
from atsnn.quantization import float_twin
from atsnn.spikformer import Spikformer
from export import load_images, load_subject
from export.graph import LIF, Graph
from export.spikformer import compile_spikformer
from hardware.engine import run
from hardware.variants import open_all_gates

Row = dict[str, Any]
Images = npt.NDArray[np.uint8]
EAGER, FUSED = "PyTorch eager", "PyTorch eager, fused neurons"
BATCHES = (1, 8, 64)
DRIVE = 0.25
"""Mean input current, with unit variance, at which about a tenth of the neurons fire."""


def random_spikformer(config: ModelConfig, images: Images) -> Spikformer:
    """Random weights, normalised on a few images so that about a tenth of the neurons fire."""
    torch.manual_seed(0)
    model = Spikformer(config)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        torch.nn.init.constant_(norm.bias, DRIVE)
    with torch.no_grad():
        model.train()(torch.from_numpy(images).float() / 255)
    return model.eval()


def all_tokens(model: Spikformer) -> Spikformer:
    """The float network that processes every token."""
    twin = float_twin(model)
    twin.adaptive = False
    for block in twin.block_list:
        block.merging = None
    return twin.eval()


@contextmanager
def plain_neurons() -> Iterator[None]:
    """Without the package's fused neurons, step by step as torch operations."""
    fits = neurons.fits
    neurons.fits = lambda *_, **__: False
    try:
        yield
    finally:
        neurons.fits = fits


def infer(model: Spikformer, images: Images, batch: int) -> None:
    """Float inference over all images."""
    with torch.no_grad():
        for start in range(0, len(images), batch):
            model(torch.from_numpy(images[start : start + batch]).float() / 255)


def timed(action: Callable[[], Any]) -> float:
    """Seconds of wall-clock time."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def best_batch(model: Spikformer, images: Images) -> int:
    """The fastest batch size, each tried once on at most 64 images after a warm-up."""
    few = images[:64]
    infer(model, few[:2], 2)
    return min(BATCHES, key=lambda batch: timed(lambda: infer(model, few, batch)))


def compare(what: str, graph: Graph, model: Spikformer, images: Images, repeats: int) -> list[Row]:
    """Medians of the engine, with all event counts, and of both peers, which take turns."""
    run(graph, images[:2], record="none")
    rows = []
    with plain_neurons():
        batches = {EAGER: best_batch(model, images)}
    batches[FUSED] = best_batch(model, images)
    times: dict[str, list[float]] = {"ours": [], EAGER: [], FUSED: []}
    for _ in range(repeats):
        times["ours"].append(timed(lambda: run(graph, images, record="none")))
        with plain_neurons():
            times[EAGER].append(timed(lambda: infer(model, images, batches[EAGER])))
        times[FUSED].append(timed(lambda: infer(model, images, batches[FUSED])))
    ours = statistics.median(times.pop("ours"))
    for peer, seconds in times.items():
        rows.append(
            {
                "what": f"{what}, {len(images)} images",
                "ours_s": ours,
                "peer": f"{peer}, batch {batches[peer]}",
                "peer_s": statistics.median(seconds),
                "ratio": round(statistics.median(seconds) / ours, 2),
            }
        )
    return rows


def density(graph: Graph, images: Images) -> float:
    """Mean share of neurons that fire at a step."""
    trace = run(graph, images, count_events=False).trace
    spikes = [trace[node.name] for node in graph.of_kind(LIF)]
    return sum(int(s.sum()) for s in spikes) / sum(s.size for s in spikes)


def built_in(repeats: int, count: int) -> Iterator[Row]:
    """The built-in model, adaptive and with all tokens."""
    subject = load_subject()
    assert subject.model is not None
    images = load_images(subject.graph, count).pixels
    model = all_tokens(subject.model)
    for graph, how in ((subject.graph, "as it is"), (open_all_gates(subject.graph), "all tokens")):
        share = density(graph, images[:32])
        what = f"built-in model {how}, {share:.1%} of neurons fire"
        yield from compare(what, graph, model, images, repeats)


def large(repeats: int, count: int) -> Iterator[Row]:
    """The shape of Spikformer-4-384 on 32 x 32 pixels, random weights."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(count, 8), 3, 32, 32), dtype=np.uint8)
    model = random_spikformer(ModelConfig(), images[:8])
    graph = compile_spikformer(model)
    share = density(graph, images[:2])
    what = f"Spikformer-4-384 shape, random weights, all tokens, {share:.1%} of neurons fire"
    yield from compare(what, graph, model, images[:count], repeats)


def conditions() -> str:
    """Versions, threads, cores and load, for the report."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "numba"))
    return (
        f"Python {platform.python_version()}, {packages}; threads: torch "
        f"{torch.get_num_threads()}, numba {numba.get_num_threads()}; {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """Print the comparisons: a table, or with `--json` a list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=512, help="for the built-in model")
    parser.add_argument("--large-images", type=int, default=32, help="for the large shape")
    options = parser.parse_args()
    print(conditions(), file=sys.stderr if options.json else sys.stdout, flush=True)
    found = []
    for part in (
        built_in(options.repeats, options.images),
        large(options.repeats, options.large_images),
    ):
        for row in part:
            found.append(row)
            if not options.json:
                print(
                    f"{row['ratio']:6.2f} x  {row['ours_s']:7.3f} s, {row['peer']} "
                    f"{row['peer_s']:7.3f} s: {row['what']}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
