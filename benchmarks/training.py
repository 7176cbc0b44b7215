"""A training step against norse and SpikingJelly: `python -m benchmarks.training [--json]`.

A step is forward, cross-entropy, backward and AdamW, float32, all tokens, T = 4, 32 x 32 pixels.
Before it is timed, every spike and gradient is compared with the peers' (in float64).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import numba
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from atsnn.config import ModelConfig
from atsnn.errors import AtsnnError
from atsnn.memory import kept_memory
from atsnn.progress import Meter, say
from atsnn.spikformer import Spikformer
from benchmarks.side_by_side import (
    Action,
    ClockName,
    Comparison,
    Section,
    as_json,
    conditions,
    markdown,
    medians,
    quantity,
    show,
    take_turns,
)
from benchmarks.training_peers import JELLY, NORSE, OURS, check_same, peer

PACKAGES = ("torch", "norse", "spikingjelly", "numpy", "numba")
SHAPES = {
    "2-64": (ModelConfig(blocks=2, dim=64, heads=4), 50),
    "4-384": (ModelConfig(blocks=4, dim=384, heads=12), 8),
}
"""Models and their images in a step."""
CHECKED_IMAGES = 2


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

    Raises:
        BenchmarkError: a peer fires otherwise or has other gradients.
    """
    model = lively_model(config)
    same = check_same(model, peers, *batch(config, CHECKED_IMAGES))
    images, labels = batch(config, count)
    actions = {n: training_step(peer(model, n), images, labels) for n in (OURS, *peers)}
    with kept_memory(), Meter(name, (turns + 1) * len(actions), console) as meter:
        note = lambda who: meter.advance(note=who)  # noqa: E731 one line of progress
        take_turns(actions, 1, after=note)  # compilation and first allocations do not count
        times = medians(take_turns(actions, turns, clock.clock(threads()), after=note))
    what = f"training step of Spikformer-{name}, {count} images"
    return Section(
        name,
        f"Training step of Spikformer-{name}",
        [Comparison(what, times[OURS], n, times[n]) for n in peers],
        [
            same,
            f"Ours: {quantity(times[OURS] / count, 's')} an image; "
            "all keep freed memory (atsnn.memory), which helps the peers too",
        ],
    )


def threads() -> dict[str, int]:
    """Threads of both sides."""
    return {"torch": torch.get_num_threads(), "numba": numba.get_num_threads()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main_command(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(help=f"Shapes, of {', '.join(SHAPES)}.", show_default=False),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each median.")] = 5,
    clock: Annotated[
        ClockName, typer.Option(help="cpu: CPU time of one thread, for a machine that others use.")
    ] = ClockName.wall,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Time a training step beside norse's and SpikingJelly's."""
    unknown = [name for name in shapes or () if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(SHAPES)}")
    clock.clock(threads())
    plain = not (json or as_markdown)
    line = conditions(PACKAGES, threads(), turns, clock)
    say(Console(stderr=not plain), line)
    sections = []
    for name in shapes or SHAPES:
        section = compare(name, *SHAPES[name], turns, clock, Console(stderr=True))
        sections.append(section)
        if plain:
            show(section, Console())
        elif as_markdown:
            print(f"### {section.title}\n\n{markdown(section, line)}\n", flush=True)
    if json:
        print(as_json(sections))


def main() -> None:
    """Entry point: errors that a user can cause end in one line and exit status 1."""
    try:
        app()
    except AtsnnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
