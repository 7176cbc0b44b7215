"""Neurons that Lava lacks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var

from atsnn.fixed_point import NeuronConstants
from export.lava.wire import wire_shape


class GatedLIF(AbstractProcess):
    """Bit-accurate LIF neurons, held while the gate of their token is closed.

    The state is zero at the first step of every image.

    Args:
        shape: wire shape; with a gate [N, 1, D].
        constants: of the neurons; one bias for each entry of the last axis.
        reset_interval: time steps of an image.
        reset_offset: time step (modulo the interval) at which an image begins.
        delays: time steps by which `a_in` and `gate_in` [N] are late; without `gate_in` all gates
            are open.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        constants: NeuronConstants,
        reset_interval: int,
        reset_offset: int,
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(
            constants=constants,
            reset_interval=reset_interval,
            reset_offset=reset_offset,
            delays=delays,
            name=name,
        )
        self.a_in = InPort(shape=shape)
        self.gate_in = InPort(shape=shape[:1])
        self.s_out = OutPort(shape=shape)
        self.u = Var(shape=shape, init=0)
        self.v = Var(shape=shape, init=0)


class OrPool(AbstractProcess):
    """Fires where any neuron of a window fired, one time step later.

    Args:
        shape: graph shape [C, H, W] of the input.
        kernel, stride, padding: (vertical, horizontal).
        delays: time steps by which `s_in` is late.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(kernel=kernel, stride=stride, padding=padding, delays=delays, name=name)
        size = [
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(shape[1:], kernel, stride, padding, strict=True)
        ]
        pooled = wire_shape((shape[0], *size))
        self.s_in = InPort(shape=wire_shape(shape))
        self.s_out = OutPort(shape=pooled)
        self.s_buf = Var(shape=pooled, init=np.zeros(pooled, np.int32))
