"""Draw time against tokens kept, density, T and model size: `python -m benchmarks.plot`.

Log-log, with the slope of a least-squares line: 1 means that time grows in proportion. `--json`
prints the points as well; `--from FILE` draws such points again without measuring.
"""

from __future__ import annotations

import json as json_format
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from atsnn.config import ModelConfig
from atsnn.files import write_atomically
from atsnn.progress import Meter, say
from benchmarks import networks, peers
from benchmarks.engine import LARGE, PACKAGES, engine, threads
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import (
    Action,
    ClockName,
    ClockOption,
    TurnsOption,
    conditions,
    median,
    median_difference,
    one_line_errors,
    take_turns,
)
from export.graph import Graph
from hardware.engine import run
from hardware.variants import open_all_gates

PICTURE = Path(__file__).parent.parent / "docs" / "performance.png"
TOKENS = (0.125, 0.25, 0.5, 0.75, 1.0)
DENSITIES = (0.025, 0.05, 0.1, 0.2, 0.4)
STEPS = (1, 2, 4, 8, 16)
CAPTION_WIDTH = 150
WIDTHS = (96, 192, 384, 768)

ENGINE, ENCODER, EAGER = "engine", "engine, encoder alone", "PyTorch eager"
STYLES = {
    ENGINE: ("#0072B2", "o", "-"),
    ENCODER: ("#009E73", "s", "-."),
    EAGER: ("#D55E00", "^", "--"),
}
"""Colours of Okabe and Ito, which the colour-blind can tell apart; markers and lines differ too."""


@dataclass(frozen=True)
class Point:
    """A median time.

    Attributes:
        panel: what varies. series: what was timed. x: where. ms: milliseconds per image.
    """

    panel: str
    series: str
    x: float
    ms: float


@dataclass(frozen=True)
class Panel:
    """What varies in a panel.

    Attributes:
        key: name in the points. label: of the axis. ticks: text of each tick.
        points: measures one value of the axis after the other.
    """

    key: str
    label: str
    tick: Callable[[float], str]
    points: Callable[[Sweep], Iterator[Point]]


@dataclass(frozen=True)
class Sweep:
    """Sizes of the measurements: turns of each median, images of each run."""

    turns: int
    images: int
    console: Console
    clock: ClockName

    def times(
        self, title: str, graphs: Mapping[str, Graph], tuned: networks.Tuned, images: peers.Images
    ) -> dict[str, list[float]]:
        """Milliseconds per image of the engine on each graph and of PyTorch, in each turn."""
        network = peers.eager(peers.folded(tuned.model))
        actions: dict[str, Action] = {EAGER: lambda: peers.infer(network, images, len(images))}
        actions.update({name: engine(graph, images) for name, graph in graphs.items()})
        found = self._turns(title, actions)
        return {name: [1e3 * s / len(images) for s in seconds] for name, seconds in found.items()}

    def _turns(self, title: str, actions: Mapping[str, Action]) -> dict[str, list[float]]:
        """Seconds of each action in each turn, all of them run once before."""
        with Meter(title, (self.turns + 1) * len(actions), self.console) as meter:
            for name, action in actions.items():
                action()
                meter.advance(note=name)
            return take_turns(
                actions,
                self.turns,
                self.clock.clock(threads()),
                after=lambda name: meter.advance(note=name),
            )


# --- measuring ---


def tokens_kept(sweep: Sweep) -> Iterator[Point]:
    """The large shape at 10 % density; the brighter patches halt before block 1."""
    tuned = networks.tuned_spikformer(networks.halting_config(LARGE))
    images = networks.random_images(LARGE, sweep.images)
    graphs = {share: networks.halted(tuned.model, share, images) for share in TOKENS}
    named = {f"{share:.1%} of tokens": graph for share, graph in graphs.items()}
    named["stem"] = networks.stem_only(open_all_gates(graphs[1.0]))
    times = sweep.times("tokens kept", named, tuned, images)
    for share, graph in graphs.items():
        kept = run(graph, images, record="none", count_events=False).average_tokens
        whole = times[f"{share:.1%} of tokens"]
        encoder = median_difference(whole, times["stem"], "encoder")
        yield Point("tokens", ENGINE, kept, median(whole))
        yield Point("tokens", ENCODER, kept, encoder)
        yield Point("tokens", EAGER, kept, median(times[EAGER]))


def _both(
    sweep: Sweep, panel: str, x: float | None, config: ModelConfig, density: float
) -> Iterator[Point]:
    """The engine and PyTorch on one tuned network; `x` None: the density that was found."""
    tuned = networks.tuned_spikformer(config, density)
    images = networks.random_images(config, sweep.images)
    times = sweep.times(f"{panel} {x or density:g}", {ENGINE: tuned.graph}, tuned, images)
    for name in (ENGINE, EAGER):
        yield Point(panel, name, tuned.density if x is None else x, median(times[name]))


def density(sweep: Sweep) -> Iterator[Point]:
    """The large shape at several densities, all tokens."""
    for target in DENSITIES:
        yield from _both(sweep, "density", None, LARGE, target)


def steps(sweep: Sweep) -> Iterator[Point]:
    """The large shape with several T, each at 10 % density, all tokens."""
    for count in STEPS:
        config = LARGE.model_copy(update={"steps": count})
        yield from _both(sweep, "steps", count, config, networks.DENSITY)


def size(sweep: Sweep) -> Iterator[Point]:
    """Four blocks of several widths, each at 10 % density, all tokens."""
    for width in WIDTHS:
        config = LARGE.model_copy(update={"dim": width})
        yield from _both(sweep, "size", _parameters(config), config, networks.DENSITY)


def _parameters(config: ModelConfig) -> float:
    """Parameters of the folded network, in millions."""
    model = networks.random_spikformer(config, networks.random_images(config, 1), drive=0.0)
    return sum(p.numel() for p in peers.folded(model).parameters()) / 1e6


def _percent(value: float) -> str:
    return f"{round(200 * value) / 2:g} %"


PANELS = (
    Panel("tokens", "tokens kept (active cells / (L·T·N))", _percent, tokens_kept),
    Panel("density", "mean density (SOPs / dense operations)", _percent, density),
    Panel("steps", "time steps T", lambda value: f"{value:g}", steps),
    Panel("size", "parameters, millions (width 96 to 768)", lambda value: f"{value:.2g}", size),
)


# --- drawing ---


def slope(points: Sequence[Point]) -> float:
    """Exponent of the power law that fits points best, by least squares of the logarithms.

    Raises:
        BenchmarkError: fewer than two different places.
    """
    if len({point.x for point in points}) < 2:
        raise BenchmarkError(
            f"{len(points)} points at one place have no slope; measure at two or more"
        )
    exponent, _ = _fit(points)
    return exponent


def _fit(points: Sequence[Point]) -> tuple[float, float]:
    x, y = np.log([p.x for p in points]), np.log([p.ms for p in points])
    exponent, offset = np.polyfit(x, y, 1)
    return float(exponent), float(offset)


def draw(points: Sequence[Point], caption: str) -> bytes:
    """The picture as PNG: one panel for each quantity that varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 8), layout="constrained", sharey=True)
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        _draw_panel(axis, panel, [p for p in points if p.panel == panel.key])
    for axis in axes[:, 0]:
        axis.set_ylabel("milliseconds per image")
    figure.suptitle(
        "Spikformer-4-384 shape, 32 × 32 pixels; unless varied: all tokens, 10 % density, T = 4"
    )
    figure.supxlabel(caption, fontsize=8, color="#444444")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot.close(figure)
    return _few_colours(picture)


def _few_colours(picture: BytesIO) -> bytes:
    """The same PNG with a palette, a third of the size."""
    small = BytesIO()
    Image.open(picture).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def _draw_panel(axis: Any, panel: Panel, points: Sequence[Point]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((p for p in points if p.series == series), key=lambda p: p.x)
        colour, marker, line = STYLES[series]
        exponent, offset = _fit(own)
        ends = np.array([own[0].x, own[-1].x])
        label = f"{series}: slope {exponent:.2f}".replace("-", "−")
        axis.plot(ends, np.exp(offset) * ends**exponent, line, color=colour, linewidth=1.2)
        axis.plot(
            [p.x for p in own], [p.ms for p in own], marker, color=colour, markersize=6, label=label
        )
    places = sorted({point.x for point in points})
    axis.set_xticks(places, [panel.tick(place) for place in places])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(panel.label)
    axis.grid(True, which="both", color="#dddddd", linewidth=0.6)
    axis.legend(fontsize=9, loc="best", framealpha=0.9)


# --- the command ---

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def plot(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, PNG.")] = PICTURE,
    turns: TurnsOption = 5,
    images: Annotated[int, typer.Option(min=1, help="Images of each run.")] = 8,
    clock: ClockOption = ClockName.wall,
    json: Annotated[bool, typer.Option("--json", help="Print the points as well.")] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Points that --json printed: do not measure."),
    ] = None,
) -> None:
    """Measure and draw time against tokens kept, density, T and model size."""
    console = Console(stderr=True)
    if source is not None:
        caption, points = _read(source)
    else:
        clock.clock(threads())
        who = conditions(PACKAGES, threads(), turns, clock)
        caption = (
            f"{who}; PyTorch float32, all tokens, batch {images}; engine without the checks of the "
            "weights, which a run does once"
        )
        say(console, caption)
        sweep = Sweep(turns, images, console, clock)
        points = [point for panel in PANELS for point in panel.points(sweep)]
    write_atomically(out, draw(points, _wrapped(caption)))
    say(console, f"{out} written")
    for panel in PANELS:
        for series in STYLES:
            own = [p for p in points if p.panel == panel.key and p.series == series]
            if own:
                say(console, f"time against {panel.label}: {series}, slope {slope(own):.2f}")
    if json:
        record = {"conditions": caption, "points": [asdict(point) for point in points]}
        print(json_format.dumps(record, indent=2))


def _wrapped(caption: str) -> str:
    lines = -(-len(caption) // CAPTION_WIDTH)
    return "\n".join(textwrap.wrap(caption, len(caption) // lines + 10))


def _read(path: Path) -> tuple[str, list[Point]]:
    try:
        record = json_format.loads(path.read_text(encoding="utf-8"))
        return record["conditions"], [Point(**point) for point in record["points"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path}: does not hold the points that --json prints ({error})"
        ) from None


def main() -> None:
    """Entry point."""
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
