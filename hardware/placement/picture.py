"""Pictures of the mesh: for a terminal, and as a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atsnn.files import write_atomically
from hardware.errors import PlacementError
from hardware.placement.measure import PlacedEvents
from hardware.placement.place import Placement

_SHADES = " .:-=+*#%@"
SUFFIXES = (".png", ".svg", ".pdf")


def tile_grid(placement: Placement, of_core: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over the cores of each tile, [rows, columns]; nan where no core is used."""
    mesh = placement.mesh
    shape = (int(mesh.y.max()) + 1, int(mesh.x.max()) + 1)
    total, count = np.zeros(shape), np.zeros(shape)
    at = mesh.y[placement.place], mesh.x[placement.place]
    np.add.at(total, at, of_core)
    np.add.at(count, at, 1)
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


def load_of_cores(placement: Placement) -> npt.NDArray[np.float64]:
    """How full each core is: its fullest resource, 0 ... 1."""
    return (placement.packing.used / placement.limits.array).max(axis=1)


def dark_of_cores(events: PlacedEvents) -> npt.NDArray[np.float64]:
    """Share of steps in which each core is dark, 0 ... 1."""
    return events.core_dark / (events.images * events.steps)


def as_text(placement: Placement, of_core: npt.NDArray[np.float64]) -> str:
    """One character a tile, from ' ' (nothing) to '@' (full); chips are set apart by bars."""
    grid = tile_grid(placement, of_core)
    mesh = placement.mesh
    lines = []
    for y, row in enumerate(grid):
        if y and y % mesh.rows == 0:
            lines.append("-" * (grid.shape[1] + (grid.shape[1] - 1) // mesh.columns))
        cells = ["·" if np.isnan(v) else _SHADES[min(9, int(10 * v))] for v in row]
        parts = ["".join(cells[x : x + mesh.columns]) for x in range(0, len(cells), mesh.columns)]
        lines.append("|".join(parts))
    return "\n".join(lines)


def figure(panels: int, width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure that needs no display, and its axes (always an array)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure((width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, np.atleast_1d(drawing.subplots(panels, 1))


def save(drawing: Any, path: str | Path) -> None:
    """Write a figure whole or not at all.

    Raises:
        PlacementError: a suffix that is no picture, or a file that cannot be written.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise PlacementError(f"{file}: a picture ends in {', '.join(SUFFIXES)}")
    content = io.BytesIO()
    drawing.savefig(content, format=file.suffix[1:], dpi=130)
    try:
        write_atomically(file, content.getvalue())
    except OSError as error:
        raise PlacementError(f"{file}: cannot be written ({error.strerror})") from error


def draw(placement: Placement, path: str | Path, events: PlacedEvents | None = None) -> None:
    """The mesh coloured by load and, with events, by the share of steps dark (PNG, SVG or PDF).

    Raises:
        PlacementError: see `save`.
    """
    shown = [("load (fullest resource of a core)", load_of_cores(placement), "viridis")]
    if events is not None:
        shown.append(("share of steps dark", dark_of_cores(events), "magma_r"))
    grid = tile_grid(placement, shown[0][1])
    wide = max(5.0, 0.35 * grid.shape[1] + 2)
    tall = max(2.0, 0.35 * grid.shape[0] + 1)
    drawing, axes = figure(len(shown), min(wide, 30), min(tall * len(shown), 30))
    mesh = placement.mesh
    for axis, (title, of_core, colours) in zip(axes, shown, strict=True):
        image = axis.imshow(tile_grid(placement, of_core), vmin=0, vmax=1, cmap=colours)
        for x in range(mesh.columns, grid.shape[1], mesh.columns):
            axis.axvline(x - 0.5, color="white", linewidth=2)
        for y in range(mesh.rows, grid.shape[0], mesh.rows):
            axis.axhline(y - 0.5, color="white", linewidth=2)
        axis.set(title=f"{placement.profile.name}: {title}", xlabel="tile, x", ylabel="tile, y")
        drawing.colorbar(image, ax=axis)
    save(drawing, path)
