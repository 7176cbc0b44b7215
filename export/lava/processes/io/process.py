"""Processes at the rim of a network: where images enter and where values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var

from export.lava.wire import Recorder, wire_shape


class ImageSource(AbstractProcess):
    """Sends each image for `steps` time steps, then zeros.

    Args:
        frames: integers [1, B, ...], or [T, B, ...] for events, each in wire layout.
        steps: time steps T of an image.
        progress_path: file to which the current time step is written.
    """

    def __init__(
        self,
        *,
        frames: npt.NDArray,
        steps: int,
        progress_path: Path | None = None,
        name: str,
    ) -> None:
        super().__init__(frames=frames, steps=steps, progress_path=progress_path, name=name)
        self.s_out = OutPort(shape=frames.shape[2:])


class Probe(AbstractProcess):
    """Writes every value that arrives at port `s_in<i>` into the file of recorder i.

    Args:
        recorders: at most `Probe.WIDTH`; each knows file, graph shape and the steps to keep.
    """

    WIDTH = 16

    def __init__(self, *, recorders: Sequence[Recorder], name: str) -> None:
        super().__init__(recorders=recorders, name=name)
        for index in range(Probe.WIDTH):
            used = index < len(recorders)
            shape = wire_shape(recorders[index].shape) if used else (1,)
            setattr(self, f"s_in{index}", InPort(shape=shape))


class Readout(AbstractProcess):
    """Adds up an image's values and gives its class scores at the image's last time step.

    At the other steps `a_out` is 0. Scores are `weight @ sum_t sum_k size_k x_k + bias`, int64.

    Args:
        shape: wire shape of `x_in`.
        weight: integers [classes, D].
        bias: integers [classes].
        steps: time steps of an image.
        depth: hardware steps after which the first image's first value arrives.
        delays: time steps by which `x_in` and `size_in` are late; without `size_in` every token
            counts once.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        weight: npt.NDArray[np.integer],
        bias: npt.NDArray[np.integer],
        steps: int,
        depth: int,
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(steps=steps, depth=depth, delays=delays, name=name)
        self.x_in = InPort(shape=shape)
        self.size_in = InPort(shape=shape[:1])
        self.a_out = OutPort(shape=bias.shape)
        self.weight = Var(shape=weight.shape, init=weight)
        self.bias = Var(shape=bias.shape, init=bias)
        self.total = Var(shape=(weight.shape[1],), init=0)
