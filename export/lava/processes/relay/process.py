"""Relays between processes, and sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from export.lava.wire import wire_shape

Layout = Literal["same", "tokens", "flatten"]


class Relay(AbstractProcess):
    """Passes on what arrives.

    Args:
        shape: graph shape of the input.
        delays: time steps by which `a_in` and, where it is connected, `gate_in` [N] are late;
            tokens whose gate is closed send no message.
        layout: `tokens` turns a map into row-major tokens, `flatten` anything into a vector.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        delays: Mapping[str, int],
        layout: Layout = "same",
        name: str,
    ) -> None:
        super().__init__(shape=shape, delays=delays, layout=layout, name=name)
        self.a_in = InPort(shape=wire_shape(shape))
        self.gate_in = InPort(shape=shape[:1])
        self.a_out = OutPort(shape=wire_shape(_laid_out(shape, layout)))


def _laid_out(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    if layout == "tokens":
        return (shape[1] * shape[2], shape[0])
    return (math.prod(shape),) if layout == "flatten" else shape


class Sum(AbstractProcess):
    """Adds up what arrives at its ports `a_in0`, `a_in1`, ..., each shifted to the left by itself.

    Args:
        shape: wire shape.
        shifts: bits for each port that is connected, at most `Sum.WIDTH`.
        delays: time steps by which each of these ports is late.
    """

    WIDTH = 16

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        shifts: Sequence[int],
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(shifts=shifts, delays=delays, name=name)
        for index in range(Sum.WIDTH):
            setattr(self, f"a_in{index}", InPort(shape=shape))
        self.a_out = OutPort(shape=shape)
