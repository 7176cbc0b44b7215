"""LIF neurons over a batch, in the arithmetic of `fixed_point.lif_step`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import (
    ACTIVATION_LIMIT,
    ACTIVATION_SHIFT,
    DECAY_UNITY,
    STATE_LIMIT,
    NeuronConstants,
    lif_step,
)

HALVING = DECAY_UNITY // 2
NO_CURRENT_MEMORY = DECAY_UNITY - 1


class Neurons:
    """State of one LIF layer for a batch of images.

    A layer without current memory whose voltage halves or stays, and whose activation cannot wrap,
    takes a short cut in 32 bits that gives the same integers; all others go through `lif_step`.
    """

    def __init__(
        self, constants: NeuronConstants, bias: npt.NDArray[np.int32], largest_activation: int
    ) -> None:
        self.constants = constants
        self.bias = bias
        self.short = (
            constants.du == NO_CURRENT_MEMORY
            and constants.dv in (0, HALVING)
            and largest_activation <= ACTIVATION_LIMIT
        )
        self.current_wraps = 0
        self.voltage_saturations = 0
        self.voltage = np.zeros((0,), np.int32)
        self.current = np.zeros((0,), np.int32)

    def start(self, shape: tuple[int, ...]) -> None:
        """Zero state of shape [B, ...]."""
        self.voltage = np.zeros(shape, np.int32)
        self.current = np.zeros((0,) if self.short else shape, np.int32)

    def step(self, activation: npt.NDArray) -> npt.NDArray[np.bool_]:
        """One time step of all neurons; spikes, bool [B, ...]."""
        if self.short:
            self.voltage, spikes = self._short(self.voltage, activation, self.bias)
            return spikes
        return self._full((), activation, self.bias)

    def step_rows(
        self, activation: npt.NDArray, rows: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """One time step of the neurons of the open tokens `rows` [B, N] only; spikes [B, N, D]."""
        spikes = np.zeros(self.voltage.shape, np.bool_)
        bias = np.broadcast_to(self.bias, self.voltage.shape)[rows]
        if self.short:
            self.voltage[rows], spikes[rows] = self._short(
                self.voltage[rows], activation[rows], bias
            )
        else:
            spikes[rows] = self._full(rows, activation[rows], bias)
        return spikes

    def _short(
        self, voltage: npt.NDArray[np.int32], activation: npt.NDArray, bias: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        if self.constants.dv == HALVING:
            voltage -= voltage >> 31  # the halving rounds toward zero, a shift alone would not
            voltage >>= 1
        voltage += activation.astype(np.int32) << ACTIVATION_SHIFT
        voltage += bias
        self.voltage_saturations += _clip(voltage)
        spikes = voltage > (self.constants.threshold << ACTIVATION_SHIFT)
        voltage[spikes] = 0
        return voltage, spikes

    def _full(
        self, where: npt.NDArray[np.bool_] | tuple[()], activation: npt.NDArray, bias: npt.NDArray
    ) -> npt.NDArray[np.bool_]:
        result = lif_step(
            self.current[where], self.voltage[where], activation, self.constants, bias
        )
        self.current[where], self.voltage[where] = result.current, result.voltage
        self.current_wraps += result.current_wraps
        self.voltage_saturations += result.voltage_saturations
        return result.spikes

    def idle(self, activation: npt.NDArray) -> npt.NDArray[np.bool_]:
        """Neurons that the coming step leaves unchanged: no input, no state, no bias."""
        quiet = (activation == 0) & (self.voltage == 0) & (self.bias == 0)
        return quiet if self.short else quiet & (self.current == 0)


def _clip(voltage: npt.NDArray[np.int32]) -> int:
    """Saturate in place and count how many were out of range."""
    if not voltage.size or (voltage.max() <= STATE_LIMIT and voltage.min() >= -STATE_LIMIT):
        return 0
    outside = int(np.count_nonzero(np.abs(voltage) > STATE_LIMIT))
    np.clip(voltage, -STATE_LIMIT, STATE_LIMIT, out=voltage)
    return outside
