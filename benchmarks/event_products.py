"""Event-driven against dense products, layer by layer: `python -m benchmarks.event_products`.

Inputs are those of the layers in a training step of random weights (`benchmarks.training`); what
events take forward includes finding them. Prints Markdown, milliseconds of one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from atsnn import event_products
from atsnn.layers import ConvLayer, TokenLayer
from atsnn.memory import kept_memory
from atsnn.spikformer import Spikformer
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import (
    Action,
    ClockName,
    ClockOption,
    TurnsOption,
    conditions,
    median,
    one_line_errors,
    timed,
)
from benchmarks.training import SHAPES, ShapesArgument, batch, chosen, lively_model, threads

COLUMNS = (
    "layer",
    "not 0",
    "worth it up to",
    "dense forward",
    "dense weights",
    "events forward",
    "events weights",
    "dense / events",
    "taken",
)


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer: products and gradients of weights."""

    name: str
    density: float
    most: float
    dense: tuple[float, float]
    events: tuple[float, float]
    taken: bool

    def cells(self) -> list[str]:
        """As a row of the table."""
        times = [f"{1e3 * seconds:.1f}" for seconds in (*self.dense, *self.events)]
        ratio = f"{sum(self.dense) / sum(self.events):.2f}"
        shares = [f"{self.density:.3f}", f"{self.most:.2f}"]
        return [self.name, *shares, *times, ratio, "events" if self.taken else "dense"]


def layer_inputs(model: Spikformer, images: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, input [M, H, W, I] and kernel [O, I, K, K] of each layer but the first."""
    found: dict[str, tuple[Tensor, nn.Module]] = {}

    def note(name: str) -> Any:
        return lambda layer, inputs: found.update({name: (inputs[0].detach(), layer.synapse)})

    for name, module in model.named_modules():
        if isinstance(module, (ConvLayer, TokenLayer)) and module is not model.stem.conv1:
            module.register_forward_pre_hook(note(name))
    model(images)
    for name, (x, synapse) in found.items():
        assert isinstance(synapse, (nn.Conv2d, nn.Linear))
        weight = synapse.weight.detach()
        if isinstance(synapse, nn.Conv2d):
            yield name, x.flatten(0, 1).permute(0, 2, 3, 1).contiguous(), weight
        else:
            yield name, x.flatten(0, 1)[:, None].contiguous(), weight[:, :, None, None]


def compare(name: str, maps: Tensor, weight: Tensor, turns: int, clock: ClockName) -> LayerTimes:
    """Times of one layer; dense products run as torch runs them in a training step.

    Raises:
        BenchmarkError: events give other results.
    """
    grad = torch.randn((*maps.shape[:3], len(weight)), generator=torch.Generator().manual_seed(0))
    side = weight.shape[2]
    planes, grad_planes = maps.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)

    def dense() -> Tensor:
        return functional.conv2d(planes, weight, padding=side // 2).permute(0, 2, 3, 1)

    def dense_weights() -> Tensor:
        aten: Any = torch.ops.aten
        pads = [side // 2, side // 2]
        return aten.convolution_backward(
            grad_planes, planes, weight, None, [1, 1], pads, [1, 1], False, [0, 0], 1,
            (False, True, False),
        )[1]  # fmt: skip

    def found() -> event_products.Events:
        events = event_products.gather(maps, weight, 1.0)
        assert events is not None
        return events

    events = found()

    def by_events() -> Tensor:
        return event_products.multiply(maps, weight, None, found())

    def weights_by_events() -> Tensor:
        return event_products.gradient_of_weight(grad, weight, events)

    for what, ours, theirs in (
        ("products", by_events, dense),
        ("gradients of the weights", weights_by_events, dense_weights),
    ):
        a, b = ours(), theirs()
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())):
            raise BenchmarkError(f"{name}: {what} from events are not those of torch")
    actions: list[Action] = [dense, dense_weights, by_events, weights_by_events]
    now = clock.clock(threads())
    times = [[timed(action, now) for action in actions] for _ in range(turns + 1)][1:]
    seconds = [median(column) for column in zip(*times, strict=True)]
    return LayerTimes(
        name,
        len(events.values) / maps.numel(),
        event_products.most_events(weight),
        (seconds[0], seconds[1]),
        (seconds[2], seconds[3]),
        event_products.find_events(maps, weight) is not None,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main_command(
    shapes: ShapesArgument = None,
    turns: TurnsOption = 5,
    clock: ClockOption = ClockName.wall,
) -> None:
    """Time the products of every layer, dense and from events."""
    names = chosen(shapes)
    print(conditions(("torch", "numpy", "numba"), threads(), turns, clock), flush=True)
    for shape in names:
        config, count = SHAPES[shape]
        print(f"\n### Spikformer-{shape}, {count} images, ms\n\n{_row(COLUMNS)}")
        print(_row(["---"] * len(COLUMNS)))
        with kept_memory():
            for layer in layer_inputs(lively_model(config), batch(config, count)[0]):
                print(_row(compare(*layer, turns, clock).cells()), flush=True)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Entry point."""
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
