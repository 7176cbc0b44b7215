"""A training step against norse and SpikingJelly: `python -m benchmarks.training [--json]`.

A step is forward, cross-entropy, backward and AdamW, float32, all tokens, T = 4, 32 x 32 pixels.
Before it is timed, every spike and gradient is compared with the peers' (in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated

import numba
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from atsnn.config import ModelConfig
from atsnn.memory import kept_memory
from atsnn.progress import Meter, say
from atsnn.spikformer import Spikformer
from benchmarks.side_by_side import (
    Action,
    ClockName,
    ClockOption,
    Comparison,
    Section,
    TurnsOption,
    as_json,
    conditions,
    markdown,
    median,
    one_line_errors,
    quantity,
    show,
    timed,
)
from benchmarks.training_peers import JELLY, NORSE, OURS, check_same, peer

PACKAGES = ("torch", "norse", "spikingjelly", "numpy", "numba")
SHAPES = {
    "2-64": (ModelConfig(blocks=2, dim=64, heads=4), 50),
    "2-96": (ModelConfig(blocks=2, dim=96, heads=6), 100),
    "4-384": (ModelConfig(blocks=4, dim=384, heads=12), 16),
}
"""Models and their images in a step."""
CHECKED_IMAGES = 2
WARM_STEPS = 2
"""Steps in front of each timed one: what others left in caches and in the heap does not count."""


def lively_model(config: ModelConfig) -> Spikformer:
    """Random weights whose norms let a share of the neurons fire, as in a trained model."""
    torch.manual_seed(0)
    model = Spikformer(config).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.0, 0.5)
    return model


def batch(config: ModelConfig, count: int) -> tuple[Tensor, Tensor]:
    """Random images [count, C, H, W] and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((count, config.in_channels, *config.image_size), generator=generator)
    return images, torch.randint(0, config.classes, (count,), generator=generator)


def training_step(model: Spikformer, images: Tensor, labels: Tensor) -> Action:
    """Forward, backward and update of one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images).logits, labels).backward()
        optimizer.step()

    return step


def compare(
    name: str,
    config: ModelConfig,
    count: int,
    turns: int,
    clock: ClockName,
    console: Console,
    peers: Sequence[str] = (NORSE, JELLY),
) -> Section:
    """Times of a training step of one shape; all take turns.

    Ours runs with freed memory kept, as `atsnn train` does. Peers run as their users run them, and
    once more with freed memory kept, so that each row says what it owes to the allocator.

    Raises:
        BenchmarkError: a peer fires otherwise or has other gradients.
    """
    model = lively_model(config)
    same = check_same(model, peers, *batch(config, CHECKED_IMAGES))
    images, labels = batch(config, count)
    steps = {n: training_step(peer(model, n), images, labels) for n in (OURS, *peers)}
    runs = [(OURS, True), *((n, False) for n in peers), *((n, True) for n in peers)]
    clock_now = clock.clock(threads())
    times: dict[tuple[str, bool], list[float]] = {run: [] for run in runs}
    with Meter(name, (turns + 1) * len(runs), console) as meter:
        for turn in range(turns + 1):  # the first compiles and does not count
            for who, keeps in runs:
                with kept_memory() if keeps else nullcontext():
                    for _ in range(WARM_STEPS):
                        steps[who]()
                    seconds = timed(steps[who], clock_now)
                if turn:
                    times[who, keeps].append(seconds)
                meter.advance(note=who)
    found = {run: median(values) for run, values in times.items()}
    ours = found[OURS, True]
    what = f"training step of Spikformer-{name}, {count} images"
    return Section(
        name,
        f"Training step of Spikformer-{name}",
        [
            Comparison(what, ours, f"{who}{', freed memory kept' if keeps else ''}", seconds)
            for (who, keeps), seconds in found.items()
            if who != OURS
        ],
        [same, f"Ours: {quantity(ours / count, 's')} an image, freed memory kept (atsnn.memory)"],
    )


def threads() -> dict[str, int]:
    """Threads of both sides."""
    return {"torch": torch.get_num_threads(), "numba": numba.get_num_threads()}


def chosen(shapes: Sequence[str] | None) -> list[str]:
    """Names of the shapes asked for, all if none is; `BadParameter` for one that is not there."""
    unknown = [name for name in shapes or () if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(SHAPES)}")
    return list(shapes or SHAPES)


ShapesArgument = Annotated[
    list[str] | None,
    typer.Argument(help=f"Shapes, of {', '.join(SHAPES)}.", show_default=False),
]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main_command(
    shapes: ShapesArgument = None,
    turns: TurnsOption = 5,
    clock: ClockOption = ClockName.wall,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Time a training step beside norse's and SpikingJelly's."""
    names = chosen(shapes)
    clock.clock(threads())
    plain = not (json or as_markdown)
    line = conditions(PACKAGES, threads(), turns, clock)
    say(Console(stderr=not plain), line)
    sections = []
    for name in names:
        section = compare(name, *SHAPES[name], turns, clock, Console(stderr=True))
        sections.append(section)
        if plain:
            show(section, Console())
        elif as_markdown:
            print(f"### {section.title}\n\n{markdown(section, line)}\n", flush=True)
    if json:
        print(as_json(sections))


def main() -> None:
    """Entry point."""
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
