"""Relays between processes."""

from __future__ import annotations

import math
from typing import Literal

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from export.lava.wire import wire_shape

Layout = Literal["same", "tokens", "flatten"]


class Relay(AbstractProcess):
    """Passes on the sum of what arrives.

    Args:
        shape: graph shape of the input.
        delay: time steps by which messages are late.
        shift: bits by which values are shifted to the left.
        gated: whether `gate_in` [N] is connected; tokens whose gate is closed send no message.
        layout: `tokens` turns a map into row-major tokens, `flatten` anything into a vector.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        delay: int = 0,
        shift: int = 0,
        gated: bool = False,
        layout: Layout = "same",
        name: str,
    ) -> None:
        super().__init__(
            shape=shape, delay=delay, shift=shift, gated=gated, layout=layout, name=name
        )
        self.a_in = InPort(shape=wire_shape(shape))
        self.gate_in = InPort(shape=shape[:1] if gated else (1,))
        self.a_out = OutPort(shape=wire_shape(_laid_out(shape, layout)))


def _laid_out(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    if layout == "tokens":
        return (shape[1] * shape[2], shape[0])
    return (math.prod(shape),) if layout == "flatten" else shape
