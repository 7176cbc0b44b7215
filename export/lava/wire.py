"""Layouts on the wires between Lava processes, and the files that probes write.

Lava's `Conv` takes W, H, C: a map [C, H, W] travels as [W, H, C] and tokens [N, D] as [N, 1, D], a
grid with one column. Vectors [D] and per-token values [N] travel as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray
Shape = tuple[int, ...]


def wire_shape(shape: Shape) -> Shape:
    """Shape on the wire of a value of the given shape in the graph."""
    if len(shape) == 3:
        return (shape[2], shape[1], shape[0])
    return (shape[0], 1, shape[1]) if len(shape) == 2 else shape


def to_wire(value: Array) -> Array:
    """A value in the graph's layout, as it travels."""
    if value.ndim == 3:
        return value.transpose(2, 1, 0)
    return value[:, None, :] if value.ndim == 2 else value


def map_from_wire(value: Array) -> Array:
    """[W, H, C] -> [C, H, W]."""
    return value.transpose(2, 1, 0)


def from_wire(value: Array, shape: Shape) -> Array:
    """A value that travelled, in the graph's layout, whose shape is given."""
    return value.transpose(2, 1, 0) if len(shape) == 3 else value.reshape(shape)


class Recorder:
    """Appends the values of one node to a file of its own, one image at a time.

    Spikes and gates are packed to bits; other values are int64. Steps before the node's first value
    and after its last are left out.

    Args:
        path: file to append to.
        shape: the node's shape in the graph.
        steps: time steps of an image.
        images: number of images.
        depth: hardware steps after which the node's first value appears.
        binary: values are 0 or 1.
    """

    def __init__(
        self, path: Path, shape: Shape, steps: int, images: int, depth: int, binary: bool
    ) -> None:
        self.path, self.shape, self.steps, self.images = path, shape, steps, images
        self.depth, self.binary = depth, binary
        self._image = np.zeros((steps, *shape), np.uint8 if binary else np.int64)

    def record(self, time_step: int, value: Array) -> None:
        """Keep `value` (graph layout) of hardware step `time_step` (the first is 1)."""
        index = time_step - 1 - self.depth
        if not 0 <= index < self.steps * self.images:
            return
        self._image[index % self.steps] = value
        if index % self.steps == self.steps - 1:
            image = np.packbits(self._image) if self.binary else self._image
            with self.path.open("wb" if index < self.steps else "ab") as file:
                file.write(image.tobytes())

    def read(self) -> Array:
        """Everything recorded, [T, B, ...]: bool, or int64 if not binary.

        Raises:
            ValueError: the file does not hold the whole run.
        """
        values = self.steps * int(np.prod(self.shape))
        width = -(-values // 8) if self.binary else values
        data = np.fromfile(self.path, np.uint8 if self.binary else np.int64)
        if data.size != width * self.images:
            raise ValueError(
                f"{self.path.name} holds {data.size} items, a whole run has {width * self.images}"
            )
        rows: Array = data.reshape(self.images, width)
        if self.binary:
            rows = np.unpackbits(rows.view(np.uint8), axis=1, count=values).astype(bool)
        return rows.reshape(self.images, self.steps, *self.shape).swapaxes(0, 1)
