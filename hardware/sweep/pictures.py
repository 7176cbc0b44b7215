"""Pictures of a sweep: accuracy against cost, token maps, steps per class."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from hardware.profile import load_profile
from hardware.sweep.files import write_file
from hardware.sweep.measure import PROFILES
from hardware.sweep.start import Stage
from hardware.sweep.summary import Point

_MARKERS = {"reference": "*", "ours": "o", "rival": "s"}
_DPI = 110
_UNITS = {"average_tokens": "", "sops": ""}
Details = dict[str, npt.NDArray[Any]]


def draw_costs(found: list[Point], path: Path) -> None:
    """Accuracy against average tokens, SOPs with the stem, and energy under each convention."""
    panels = [("average_tokens", "average tokens"), ("sops", "SOPs per image, stem included")]
    panels += [
        (f"joules/{name}", f"J per image\n{load_profile(name).convention}") for name in PROFILES
    ]
    columns = 3
    rows = -(-(len(panels) + 1) // columns)
    figure = _figure((4.2 * columns, 3.4 * rows))
    axes = figure.subplots(rows, columns).ravel()
    shown = [point for point in found if point.group in _MARKERS]
    for axis, (column, title) in zip(axes, panels, strict=False):
        _draw_points(axis, shown, column)
        axis.set_xlabel(title, fontsize=8)
        axis.set_ylabel("accuracy (validation)", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter(unit=_UNITS.get(column, "J"), sep=" "))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    handles, names = axes[0].get_legend_handles_labels()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[len(panels)].legend(handles, names, fontsize=8, loc="upper left", frameon=False)
    _save(figure, path)


def _draw_points(axis: Axes, found: Iterable[Point], column: str) -> None:
    by_method: dict[str, list[Point]] = {}
    for point in found:
        by_method.setdefault(point.method, []).append(point)
    colours = mpl.colormaps["tab20"]
    for index, group in enumerate(by_method.values()):
        group = sorted(group, key=lambda point: point.mean(column))
        x = [point.mean(column) for point in group]
        y = [point.mean("accuracy") for point in group]
        low, high = zip(*(point.spread("accuracy") for point in group), strict=True)
        axis.vlines(x, low, high, color=colours(index % 20), linewidth=1.0)
        axis.plot(
            x,
            y,
            marker=_MARKERS[group[0].group],
            markersize=10 if group[0].group == "reference" else 5,
            linewidth=1.0,
            linestyle="-" if group[0].group == "ours" else "--",
            color=colours(index % 20),
            label=group[0].label,
        )
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=7)


def draw_token_maps(details: Details, grid: tuple[int, int], path: Path) -> None:
    """For some images, how many steps each token was processed in each block.

    Where the sweep kept the images, they stand in the first row. A line leads from a token to the
    one that it was merged into, red in the block, orange behind the stem.
    """
    examples = details["examples"]  # [L, T, E, N]
    blocks, steps, count, _ = examples.shape
    count = min(count, 6)
    images = details.get("images")
    first = int(images is not None)
    figure = _figure((1.8 * count + 1.2, 1.8 * (blocks + first) + 0.3))
    figure.set_layout_engine("compressed")
    axes = figure.subplots(blocks + first, count, squeeze=False)
    colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 1, steps + 1)))
    shown = None
    for image in range(count):
        if images is not None:
            _draw_image(axes[0][image], images[image])
        for block in range(blocks):
            axis = axes[block + first][image]
            processed = examples[block, :, image].sum(0).reshape(grid)
            shown = axis.imshow(processed, cmap=colours, vmin=-0.5, vmax=steps + 0.5)
            _draw_merges(axis, details, block, image, grid)
            if not image:
                axis.set_ylabel(f"block {block + 1}", fontsize=8)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    assert shown is not None  # there is at least one block and one image
    bar = figure.colorbar(shown, ax=axes.ravel().tolist(), ticks=range(steps + 1), shrink=0.8)
    bar.set_label("steps processed", fontsize=8)
    _save(figure, path, tight=False)


def _draw_image(axis: Axes, pixels: npt.NDArray[np.uint8]) -> None:
    if pixels.ndim == 4:  # events: all steps and polarities in one frame
        pixels = pixels.max(axis=(0, 1), keepdims=True)[0]
    if len(pixels) == 3:
        axis.imshow(np.moveaxis(pixels, 0, 2))
    else:
        axis.imshow(pixels[0], cmap="gray")


def _draw_merges(
    axis: Axes, details: Details, block: int, image: int, grid: tuple[int, int]
) -> None:
    if "partner" in details:
        _draw_lines(axis, details["partner"][block, image], grid, "red")
    if block == 0 and "stem_partner" in details:
        _draw_lines(axis, details["stem_partner"][image], grid, "orange")


def _draw_lines(
    axis: Axes, partners: npt.NDArray[np.int64], grid: tuple[int, int], color: str
) -> None:
    for token, partner in enumerate(partners):
        if partner >= 0:
            rows, columns = zip(*(divmod(int(n), grid[1]) for n in (token, partner)), strict=True)
            axis.plot(columns, rows, color=color, linewidth=1.0)
            axis.plot(columns[1], rows[1], ".", color=color, markersize=3)


def draw_class_steps(details: Details, path: Path) -> None:
    """Mean number of steps that a token is processed, per class and block."""
    steps, names = details["class_steps"], [str(name) for name in details["classes"]]
    classes, blocks = steps.shape
    figure = _figure((max(5.0, 0.7 * classes), 3.0))
    axis = figure.subplots()
    width = 0.8 / blocks
    for block in range(blocks):
        places = np.arange(classes) + (block - (blocks - 1) / 2) * width
        axis.bar(places, steps[:, block], width, label=f"block {block + 1}")
    axis.set_xticks(range(classes), names, rotation=45, ha="right", fontsize=8)
    axis.set_ylabel("steps processed, mean", fontsize=8)
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    _save(figure, path)


def draw_curve(stages: list[Stage], path: Path) -> None:
    """Accuracy after each epoch of the start's training, on training images and on others."""
    figure = _figure((6.0, 3.0))
    axis = figure.subplots()
    train = [value for stage in stages for value in stage.train]
    watched = [value for stage in stages for value in stage.watched]
    epochs = range(1, len(train) + 1)
    axis.plot(epochs, train, label="training images, augmented", linewidth=1.0)
    axis.plot(epochs, watched, label=stages[-1].others, marker=".", linewidth=1.0)
    begin = 0
    for stage in stages:
        axis.axvline(begin + 0.5, color="gray", linewidth=0.6)
        axis.text(begin + 0.7, 0.95, f"{stage.name}, T = {stage.steps}", fontsize=7)
        begin += len(stage.train)
    axis.set_ylim(top=1.0)
    axis.set_xlabel("epoch", fontsize=8)
    axis.set_ylabel("accuracy", fontsize=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=7)
    _save(figure, path)


def draw_open_tokens(details: Details, grid: tuple[int, int], path: Path) -> None:
    """Share of images in which each token is processed, per block and step."""
    opened = details["open"]  # [L, T, N]
    blocks, steps, _ = opened.shape
    figure = _figure((1.6 * steps + 0.8, 1.7 * blocks + 0.3))
    axes = figure.subplots(blocks, steps, squeeze=False)
    shown = None
    for block in range(blocks):
        for step in range(steps):
            axis = axes[block][step]
            shown = axis.imshow(opened[block, step].reshape(grid), vmin=0, vmax=1)
            axis.set_title(f"block {block + 1}, step {step + 1}", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
    assert shown is not None  # there is at least one block and one step
    bar = figure.colorbar(shown, ax=axes.ravel().tolist(), shrink=0.8)
    bar.set_label("share of images", fontsize=8)
    _save(figure, path, tight=False)


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(size, dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path, tight: bool = True) -> None:
    if tight:
        figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    write_file(path, stream.getvalue())
