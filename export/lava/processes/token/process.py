"""Processes that decide which tokens are processed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var

from export.graph import Merge


class HaltingScore(AbstractProcess):
    """Looks up each token's halting score by the value of its channel 0.

    Args:
        shape: wire shape [N, 1, D] of the stream.
        table: int32 [levels], scores in units of 1/4096.
        delays: time steps by which `x_in` is late.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        table: npt.NDArray[np.int32],
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(delays=delays, name=name)
        self.x_in = InPort(shape=shape)
        self.h_out = OutPort(shape=shape[:1])
        self.table = Var(shape=table.shape, init=table)


class TokenGate(AbstractProcess):
    """Accumulates halting scores; a token's gate is open while the sum is below the threshold.

    Args:
        tokens: number of tokens N.
        threshold: in units of 1/4096.
        accumulate: whether scores add up over the time steps of an image.
        steps: time steps of an image.
        depth: hardware steps after which the first image's first score arrives.
        delays: time steps by which `h_in` and `alive_in` are late; without `alive_in` all tokens
            are alive.
    """

    def __init__(
        self,
        *,
        tokens: int,
        threshold: int,
        accumulate: bool,
        steps: int,
        depth: int,
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(
            accumulate=accumulate,
            threshold=threshold,
            steps=steps,
            depth=depth,
            delays=delays,
            name=name,
        )
        self.h_in = InPort(shape=(tokens,))
        self.alive_in = InPort(shape=(tokens,))
        self.gate_out = OutPort(shape=(tokens,))
        self.total = Var(shape=(tokens,), init=0)


class TokenMerge(AbstractProcess):
    """Synaptic reduction: merges similar tokens; which ones is decided at an image's first step.

    Args:
        shape: wire shape [N, 1, D] of the stream.
        node: number of merges, smallest similarity, combination, what is compared.
        steps: time steps of an image.
        depth: hardware steps after which the first image's first value arrives.
        delays: time steps by which `x_in`, `gate_in` and, where they are connected, `alive_in`,
            `size_in` and `keys_in` are late.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        node: Merge,
        steps: int,
        depth: int,
        delays: Mapping[str, int],
        name: str,
    ) -> None:
        super().__init__(node=node, steps=steps, depth=depth, delays=delays, name=name)
        tokens = shape[:1]
        self.x_in = InPort(shape=shape)
        self.gate_in = InPort(shape=tokens)
        self.alive_in = InPort(shape=tokens)
        self.size_in = InPort(shape=tokens)
        self.keys_in = InPort(shape=shape)
        self.x_out = OutPort(shape=shape)
        self.gate_out = OutPort(shape=tokens)
        self.alive_out = OutPort(shape=tokens)
        self.size_out = OutPort(shape=tokens)
        self.partner = Var(shape=tokens, init=np.full(tokens, -1))
        self.size = Var(shape=tokens, init=np.ones(tokens))
