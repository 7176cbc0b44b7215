"""What the process models here have in common: messages that arrive late, and ports left open."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt
from lava.magma.core.model.py.model import PyLoihiProcessModel


class ArrivalsModel(PyLoihiProcessModel):
    """Takes the messages of a port as many time steps late as `proc_params["delays"]` says.

    As on a chip, the delay belongs to the synapse that a message arrives at; before the first
    message a delayed port gives zeros. A port that `delays` does not name is not connected.
    """

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.delays: dict[str, int] = dict(proc_params["delays"])
        self.waiting: dict[str, deque[npt.NDArray]] = defaultdict(deque)

    def take(self, port: str) -> npt.NDArray:
        """The value that has arrived at a connected port."""
        value, waiting = getattr(self, port).recv(), self.waiting[port]
        waiting.append(value)
        return waiting.popleft() if len(waiting) > self.delays[port] else np.zeros_like(value)

    def take_or(self, port: str, default: npt.NDArray) -> npt.NDArray:
        """The value that has arrived, or `default` at a port that is not connected."""
        return self.take(port) if port in self.delays else default
