"""The engine against its peers: `python -m benchmarks.engine [PART...] [--json | --markdown]`.

Peers are float inference of the same network with all tokens, each at its best batch; ours is
`hardware.engine.Engine.run` with all event counts. Both take turns; a figure is a median.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import numba
import numpy as np
import torch
import typer
from rich.console import Console

from atsnn.config import ModelConfig
from atsnn.progress import Meter, say
from atsnn.quantization import quantize_model
from benchmarks import memory, networks, peers
from benchmarks.bandwidth import l2_read_bandwidth
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import (
    Action,
    ClockName,
    ClockOption,
    Comparison,
    Section,
    TurnsOption,
    around,
    as_json,
    conditions,
    insert,
    markdown,
    median,
    median_difference,
    medians,
    one_line_errors,
    quantity,
    show,
    take_turns,
)
from export import load_images, load_subject
from export.graph import Graph
from export.spikformer import compile_spikformer, model_trace
from hardware.engine import Engine, run
from hardware.variants import open_all_gates

PACKAGES = ("torch", "norse", "spikingjelly", "numpy", "numba")
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
LARGE = ModelConfig()
"""Spikformer-4-384 on 32 x 32 pixels, T = 4."""
LARGEST = ModelConfig(blocks=8, dim=768)
LINEAR = ((384, 1536), (1536, 384), (384, 384))
"""Inputs and outputs of fc1, fc2 and q, k, v, proj of Spikformer-4-384."""


UNCOUNTED = "the engine without counts"


class Part(str, Enum):
    """One table."""

    built_in = "built-in"
    large = "large"
    halting = "halting"
    kernel = "kernel"
    memory = "memory"
    events = "events"
    test_set = "test-set"


QUICK = tuple(part for part in Part if part is not Part.test_set)


@dataclass(frozen=True)
class Options:
    """Sizes of the measurements.

    Attributes:
        turns: turns of each median.
        images: of the built-in model. large_images: of the large shapes. data: the test set.
    """

    turns: int
    images: int
    large_images: int
    data: str
    console: Console
    clock: ClockName = ClockName.wall

    def turn(self, title: str, actions: Mapping[str, Action]) -> dict[str, list[float]]:
        """Times of all actions, with progress."""
        with Meter(title, self.turns * len(actions), self.console) as meter:
            return take_turns(
                actions,
                self.turns,
                self.clock.clock(threads()),
                after=lambda name: meter.advance(note=name),
            )


def threads() -> dict[str, int]:
    """Threads of both sides."""
    return {"torch": torch.get_num_threads(), "numba": numba.get_num_threads()}


def engine(graph: Graph, images: peers.Images, count_events: bool = True) -> Action:
    """One run of an engine that is ready, as the peers are; nothing recorded."""
    ready = Engine(graph)
    return lambda: ready.run(images, record="none", count_events=count_events)


def beside(
    what: str, ours: float, found: Sequence[peers.Peer], theirs: Mapping[str, float]
) -> list[Comparison]:
    """One row for each peer."""
    return [Comparison(what, ours, peer.label, theirs[peer.name]) for peer in found]


def describe(graph: Graph, images: peers.Images) -> str:
    """Density, firing and tokens of a graph on some images."""
    result = run(graph, images, record="none")
    assert result.events is not None
    return (
        f"{networks.density_of(result.events):.1%} mean density, "
        f"{networks.firing_of(graph, result.events):.1%} of the neurons fire at a step, average "
        f"tokens {result.average_tokens:.0%} (active cells / (L * T * N))"
    )


# --- the parts ---


def built_in(options: Options) -> Section:
    """The built-in model, as it is and with all tokens."""
    subject = load_subject()
    images = load_images(subject.graph, options.images).pixels
    return _built_in(options, Part.built_in, images, peers.ALL, uncounted=True)


def test_set(options: Options) -> Section:
    """The built-in model on a whole test set."""
    images = load_images(load_subject().graph, None, options.data).pixels
    names = (peers.EAGER, peers.COMPILED, peers.JELLY)
    return _built_in(options, Part.test_set, images, names, uncounted=False)


def _built_in(
    options: Options, part: Part, images: peers.Images, names: Sequence[str], uncounted: bool
) -> Section:
    """The model as it is and with all tokens; `uncounted`: also what counting events costs."""
    subject = load_subject()
    assert subject.model is not None  # the built-in one comes from a checkpoint
    graphs = {"as it is": subject.graph, "all tokens": open_all_gates(subject.graph)}
    found, notes = peers.make_peers(subject.model, images, names, options.clock.clock(threads()))
    actions: dict[str, Action] = {}
    for how, graph in graphs.items():
        run(graph, images[:64], record="none")
        actions[how] = engine(graph, images)
        if uncounted:
            actions[f"{how}, {UNCOUNTED}"] = engine(graph, images, count_events=False)
    actions.update({peer.name: _inference(peer, images) for peer in found})
    times = medians(options.turn(part.value, actions))
    rows = []
    for how in graphs:
        what = f"built-in model, {how}, {len(images):,} images"
        rows += beside(what, times[how], found, times)
    for how in graphs if uncounted else ():
        what, without = f"built-in model, {how}, events counted", times[f"{how}, {UNCOUNTED}"]
        rows.append(Comparison(what, times[how], UNCOUNTED, without))
    for how, graph in graphs.items():
        few = images[:512]
        notes.append(f"Built-in model, {how}, first {len(few)}: {describe(graph, few)}")
    title = f"Built-in model, {len(images):,} images"
    return Section(part.value, title, rows, notes)


def _inference(peer: peers.Peer, images: peers.Images) -> Action:
    return lambda: peer.infer(images)


def large(options: Options) -> Section:
    """The shape of Spikformer-4-384, random weights, all tokens."""
    tuned = networks.tuned_spikformer(LARGE)
    images = networks.random_images(LARGE, options.large_images)
    check_exact(tuned, images[:2])
    found, notes = peers.make_peers(tuned.model, images, clock=options.clock.clock(threads()))
    actions = {"ours": engine(tuned.graph, images), "one": engine(tuned.graph, images[:1])}
    actions.update({peer.name: _inference(peer, images) for peer in found})
    times = medians(options.turn("large", actions))
    what = f"Spikformer-4-384 shape, all tokens, {len(images)} images"
    rate = len(images) / times["ours"]
    return Section(
        "large",
        "Spikformer-4-384 shape, 32 x 32, T = 4",
        beside(what, times["ours"], found, times),
        [
            _sentence(tuned.note),
            f"On these images: {describe(tuned.graph, images[:16])}; {rate:.1f} images/s",
            f"A run of one image takes {quantity(times['one'], 's')} of ours",
            "Every spike and logit of 2 images equals the quantised torch model's",
            *notes,
        ],
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def check_exact(tuned: networks.Tuned, images: peers.Images) -> None:
    """The engine's spikes and logits are those of the quantised torch model.

    Raises:
        BenchmarkError: names the first node that differs.
    """
    expected = model_trace(quantize_model(tuned.model), images)
    trace = run(tuned.graph, images).trace
    for name, values in expected.items():
        differing = int(np.count_nonzero(trace[name] != values))
        if differing:
            raise BenchmarkError(
                f"{name}: {differing} of {values.size} values differ from the quantised torch "
                "model's; find the first with `atsnn-export verify`"
            )


def halting(options: Options) -> Section:
    """Time of the encoder with half of the tokens halted."""
    tuned = networks.tuned_spikformer(networks.halting_config(LARGE))
    images = networks.random_images(LARGE, options.large_images)
    half = networks.halted(tuned.model, 0.5, images)
    every = open_all_gates(half)
    actions = {
        "all": engine(every, images),
        "half": engine(half, images),
        "stem": engine(networks.stem_only(every), images),
    }
    for action in actions.values():
        action()
    times = options.turn("halting", actions)
    all_s, half_s = (
        median_difference(times[name], times["stem"], f"encoder, {name} tokens")
        for name in ("all", "half")
    )
    few = images[:16]
    sops = [_encoder_sops(graph, few) for graph in (half, every)]
    return Section(
        "halting",
        "Encoder of the Spikformer-4-384 shape with half of the tokens halted",
        [
            Comparison(
                f"encoder, half of the tokens, {len(images)} images",
                half_s,
                "encoder, all tokens",
                all_s,
            )
        ],
        [
            f"Half takes {half_s / all_s:.0%} of the encoder's time with all tokens, and has "
            f"{sops[0] / sops[1]:.0%} of its SOPs",
            "Encoder: a run of the whole network less a run of its stem in the same turn",
            f"The brighter half of the 4 x 4 patches halts before block 1, at every step: "
            f"{describe(half, few)}",
            f"With all tokens: {describe(every, few)}",
            _sentence(tuned.note),
        ],
    )


def _encoder_sops(graph: Graph, images: peers.Images) -> int:
    groups = networks.events_of(graph, images).group(lambda node: node.block)
    return sum(events.sum("sops") for name, events in groups.items() if name.startswith("block"))


def kernel(options: Options) -> Section:
    """Linear layers at 10 % density."""
    bandwidth = l2_read_bandwidth(options.turns, options.clock.clock(threads()))
    rows, notes = [], []
    for inputs, outputs in LINEAR:
        graph = networks.linear_layer(inputs, outputs, steps=4)
        events = networks.random_events(4, options.large_images, (inputs, 8, 8), networks.DENSITY)
        dense = torch.from_numpy(events).float().flatten(3).transpose(2, 3).flatten(0, 2)
        weight = torch.randn(outputs, inputs)
        actions: dict[str, Action] = {
            "events": engine(graph, events, count_events=False),
            "silence": engine(graph, np.zeros_like(events), count_events=False),
            "torch": _product(dense.contiguous(), weight),
        }
        for action in actions.values():
            action()
        times = options.turn(f"kernel {inputs} -> {outputs}", actions)
        sops = int(events.sum()) * outputs
        seconds = median_difference(
            times["events"], times["silence"], f"linear {inputs} -> {outputs}"
        )
        what = f"linear {inputs} → {outputs}, {len(dense):,} tokens, 10 % density"
        bound = f"bound of L2 reads, {bandwidth / 1e9:.0f} GB/s, a byte per SOP"
        rows += [
            Comparison(
                f"{what}, {sops / seconds / 1e9:.1f} G SOP/s", seconds, bound, sops / bandwidth
            ),
            Comparison(what, seconds, "torch float32 product", median(times["torch"])),
        ]
        notes.append(
            f"{inputs} → {outputs} with input, neurons and checks: "
            f"{sops / median(times['events']) / 1e9:.1f} G SOP/s"
        )
    return Section(
        "kernel",
        "Linear layers at 10 % density",
        rows,
        [
            "Ours: a run with random events less a run of the same network without any, in the "
            "same turn, nothing counted or recorded; the neurons behind the layer never fire",
            "Ratio beside the bound: the share of the machine's L2 read bandwidth that is reached; "
            "weights that serve several tokens from a register or L1 can pass it",
            *notes,
        ],
    )


def _product(dense: torch.Tensor, weight: torch.Tensor) -> Action:
    def action() -> None:
        with torch.inference_mode():
            torch.nn.functional.linear(dense, weight)

    return action


def memory_of_the_largest(options: Options) -> Section:
    """Peak memory and loading time of Spikformer-8-768 at batch 1."""
    images = networks.random_images(LARGEST, 1)
    graph = compile_spikformer(
        networks.random_spikformer(LARGEST, networks.random_images(LARGEST, 2), drive=-0.35)
    )
    small = compile_spikformer(_small(LARGEST))
    found = memory.measure(graph, images, small, images, options.turns, options.clock)
    weights, activations = memory.weight_bytes(graph), memory.activation_bytes(graph)
    what = "Spikformer-8-768, 32 x 32, T = 4, batch 1"
    return Section(
        "memory",
        "Memory and loading of Spikformer-8-768",
        [
            Comparison(
                f"{what}: peak memory",
                found.peak / 1e6,
                "3 × (8-bit weights + activations)",
                3 * (weights + activations) / 1e6,
                "MB",
            ),
            Comparison(f"{what}: load from HDF5", found.load_s, "bar", 2.0),
        ],
        [
            f"{weights / 1e6:.1f} M weights, a byte each; activations {activations / 1e6:.1f} MB: "
            "a byte for each value into and out of the largest layer at all steps",
            "Peak: what loading and one run add to an interpreter that has run a small network; "
            "random weights, not tuned to a density; the file is in the page cache",
        ],
    )


def _small(config: ModelConfig):
    tiny = config.model_copy(update={"dim": 96, "blocks": 2})
    return networks.random_spikformer(tiny, networks.random_images(tiny, 2), drive=0.0)


def events_over_time(options: Options) -> Section:
    """A small convolutional network on events over 300 time steps."""
    steps, count = 300, max(1, options.large_images // 4)
    net = networks.EventNet()
    graph = networks.event_graph(net, steps)
    events = networks.random_events(steps, count, (2, 32, 32), 0.03)
    dense = torch.from_numpy(events).float()

    def norse() -> None:
        with torch.inference_mode():
            net.counts(dense)

    actions: dict[str, Action] = {"ours": engine(graph, events), "norse": norse}
    for action in actions.values():
        action()
    times = medians(options.turn("events", actions))
    small = networks.event_graph(net, 8)
    found = memory.measure(
        graph, events[:, :1], small, events[:8, :1], options.turns, options.clock
    )
    needed = memory.weight_bytes(graph) + memory.activation_bytes(graph)
    counts = networks.events_of(graph, events)
    what = f"conv-conv-linear, 2 x 32 x 32 events, T = {steps}"
    return Section(
        "events",
        "Events over 300 time steps",
        [
            Comparison(
                f"{what}, {count} recordings", times["ours"], "norse as written", times["norse"]
            ),
            Comparison(
                f"{what}, batch 1: peak memory",
                found.peak / 1e6,
                "3 × (8-bit weights + activations)",
                3 * needed / 1e6,
                "MB",
            ),
        ],
        [
            "Random events, 3 % of the pixels at a step; random weights; "
            f"{networks.density_of(counts):.1%} mean density behind spikes, "
            f"{networks.firing_of(graph, counts):.1%} of the neurons fire at a step",
        ],
    )


PARTS: dict[Part, Callable[[Options], Section]] = {
    Part.built_in: built_in,
    Part.large: large,
    Part.halting: halting,
    Part.kernel: kernel,
    Part.memory: memory_of_the_largest,
    Part.events: events_over_time,
    Part.test_set: test_set,
}


# --- the command ---

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def compare(
    parts: Annotated[
        list[Part] | None,
        typer.Argument(help="Tables to make; without any, all but test-set.", show_default=False),
    ] = None,
    turns: TurnsOption = 5,
    images: Annotated[int, typer.Option(min=1, help="Images of the built-in model.")] = 512,
    large_images: Annotated[int, typer.Option(min=2, help="Images of the large shapes.")] = 32,
    data: Annotated[
        str, typer.Option(metavar="DIR", help="Fashion-MNIST in IDX files, for test-set.")
    ] = FASHION_MNIST,
    clock: ClockOption = ClockName.wall,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also replace these tables in a page."),
    ] = None,
) -> None:
    """Time the engine beside its peers."""
    options = Options(turns, images, large_images, data, Console(stderr=True), clock)
    clock.clock(threads())
    line = conditions(PACKAGES, threads(), turns, clock)
    plain = not (json or as_markdown)
    say(Console(stderr=not plain), line)
    if into is not None:
        for part in parts or QUICK:
            around(into, part.value)  # a page without a place is refused now, not after an hour
    sections = []
    for part in parts or QUICK:
        section = PARTS[part](options)
        sections.append(section)
        if plain:
            show(section, Console())
        elif as_markdown:
            print(f"### {section.title}\n\n{markdown(section, line)}\n", flush=True)
        if into is not None:
            insert(into, section.name, markdown(section, line))
    if json:
        print(as_json(sections))


def main() -> None:
    """Entry point."""
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
