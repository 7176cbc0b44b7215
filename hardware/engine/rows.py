"""Values as rows: tokens, or pixels, each with its channels side by side.

Nodes hand on what the graph says, maps [S, B, C, H, W], tokens [S, B, N, D] or flat [S, B, D]; the
kernels see [S, B, R, E]. Maps that the kernels made are views of rows, so going back costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import Shape

Array = npt.NDArray[Any]


def as_rows(values: Array) -> Array:
    """[S, B, R, E], contiguous; a copy only of maps that are not views of rows."""
    if values.ndim == 5:
        values = np.moveaxis(values, 2, -1)
    steps, images, *_, width = values.shape
    return np.ascontiguousarray(values).reshape(steps, images, -1, width)


def from_rows(rows: Array, shape: Shape) -> Array:
    """View of rows [S, B, R, E] as values of `shape`: (C, H, W), (N, D) or (D,)."""
    if len(shape) != 3:
        return rows.reshape(*rows.shape[:2], *shape)
    channels, height, width = shape
    return np.moveaxis(rows.reshape(*rows.shape[:2], height, width, channels), -1, 2)


def line_width(shape: Shape) -> int:
    """Rows in one line of a map; tokens are a column."""
    return shape[2] if len(shape) == 3 else 1
