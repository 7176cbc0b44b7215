"""Spiking self-attention without softmax."""

from __future__ import annotations

from collections.abc import Mapping

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var


class SpikingAttention(AbstractProcess):
    """Counts `(q k^T) v` for each head as `q (k^T v)`, one time step later.

    A head is a table of fast weights: spikes of k and v write it (a coincidence adds one), spikes
    of q read it, and it is cleared at every time step.

    Args:
        shape: wire shape [N, 1, D] of q, k and v.
        heads: number of groups of channels.
        delays: time steps by which `q_in`, `k_in` and `v_in` are late.
    """

    def __init__(
        self, *, shape: tuple[int, ...], heads: int, delays: Mapping[str, int], name: str
    ) -> None:
        super().__init__(heads=heads, delays=delays, name=name)
        self.q_in = InPort(shape=shape)
        self.k_in = InPort(shape=shape)
        self.v_in = InPort(shape=shape)
        self.a_out = OutPort(shape=shape)
        width = shape[2] // heads
        self.table = Var(shape=(heads, width, width), init=0)
        self.a_buf = Var(shape=shape, init=0)
