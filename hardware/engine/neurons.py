"""LIF neurons over a batch, in the arithmetic of `fixed_point.lif_step`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import (
    ACTIVATION_LIMIT,
    ACTIVATION_SHIFT,
    DECAY_UNITY,
    NeuronConstants,
)
from hardware.engine import buffers
from hardware.engine.firing import (
    GATED,
    IDLE,
    SATURATED,
    WRAPPED,
    fire_full,
    fire_short,
    fire_tiles,
)
from hardware.engine.rows import as_rows, from_rows

HALVING = DECAY_UNITY // 2
NO_CURRENT_MEMORY = DECAY_UNITY - 1

PerImage = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fired:
    """What some time steps brought.

    Attributes:
        spikes: bool [T, B, *shape].
        idle: updates that changed nothing, int64 [B] (0 where they were not counted).
        gated: updates that a closed gate prevented, int64 [B].
    """

    spikes: npt.NDArray[np.bool_]
    idle: PerImage
    gated: PerImage


class Neurons:
    """State of one LIF layer for a batch of images.

    A layer without current memory whose voltage halves or stays, and whose activation cannot wrap,
    takes a short cut in 32 bits that gives the same integers; all others take every step of
    `lif_step`.

    Args:
        constants: of the layer.
        shape: of one image: maps [C, H, W], tokens [N, D] or flat [D].
        largest_activation: largest magnitude that can arrive.
    """

    def __init__(
        self, constants: NeuronConstants, shape: tuple[int, ...], largest_activation: int
    ) -> None:
        self.constants, self.shape = constants, shape
        channels = shape[0] if len(shape) == 3 else shape[-1]
        self.rows = int(np.prod(shape)) // channels, channels
        self.bias = np.ascontiguousarray(np.broadcast_to(constants.bias, channels), np.int32)
        self.can_idle = not constants.bias.all()
        self.short = (
            constants.du == NO_CURRENT_MEMORY
            and constants.dv in (0, HALVING)
            and largest_activation <= ACTIVATION_LIMIT
        )
        self.current_wraps = 0
        self.voltage_saturations = 0
        self.start(0)

    def start(self, images: int) -> None:
        """Zero state for so many images."""
        self.voltage = buffers.zeros((images, *self.rows), np.int32)
        self.current = np.zeros((0 if self.short else images, *self.rows), np.int32)

    def advance(
        self,
        activation: npt.NDArray,
        gate: npt.NDArray[np.bool_] | None,
        steps: int,
        count_idle: bool = False,
    ) -> Fired:
        """Let time steps pass.

        Args:
            activation: integers [steps or 1, B, *shape].
            gate: bool [steps or 1, B, N], or None: all open.
            count_idle: whether `Fired.idle` is wanted.
        """
        images = len(self.voltage)
        arriving = as_rows(activation)
        if arriving.dtype != np.int16:
            arriving = arriving.astype(np.int32, copy=False)
        gates = np.zeros((0, images, self.rows[0]), np.bool_) if gate is None else gate
        spikes = buffers.empty((steps, images, *self.rows), np.bool_)
        counts = np.zeros((images, self.rows[0], 4), np.int64)
        self._fire(arriving, np.ascontiguousarray(gates), count_idle, spikes, counts)
        self.current_wraps += int(counts[..., WRAPPED].sum())
        self.voltage_saturations += int(counts[..., SATURATED].sum())
        return Fired(
            from_rows(spikes, self.shape),
            counts[..., IDLE].sum(axis=1),
            counts[..., GATED].sum(axis=1),
        )

    def _fire(
        self,
        arriving: npt.NDArray[np.int32],
        gates: npt.NDArray[np.bool_],
        count_idle: bool,
        spikes: npt.NDArray[np.bool_],
        counts: npt.NDArray[np.int64],
    ) -> None:
        c = self.constants
        threshold = c.threshold << ACTIVATION_SHIFT
        count_idle = count_idle and self.can_idle
        halving = int(c.dv == HALVING)
        if self.short and self.rows[1] % 16 == 0:
            fire_tiles(arriving, gates, self.bias, self.voltage, halving, threshold, spikes, counts)
        elif self.short:
            fire_short(
                arriving, gates, self.bias, self.voltage,
                np.int32(halving), np.int32(threshold), count_idle, spikes, counts,
            )  # fmt: skip
        else:
            fire_full(
                arriving, gates, self.bias, self.current, self.voltage,
                c.du, c.dv, threshold, count_idle, spikes, counts,
            )  # fmt: skip
