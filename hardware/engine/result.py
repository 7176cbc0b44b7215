"""What one run of the engine gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.events import EventCounts


@dataclass(frozen=True)
class LayerRange:
    """How often a layer's fixed-point arithmetic left its range, over all images and steps.

    Attributes:
        node: name of the LIF node; `source` the torch module it came from.
        current_wraps: times the 24-bit current wrapped round (the result is then not the model's).
        voltage_saturations: times the voltage was clipped at +-(2^23 - 1).
    """

    node: str
    source: str
    current_wraps: int
    voltage_saturations: int


@dataclass(frozen=True)
class EngineResult:
    """Logits, recorded values, event counts and gates of a run over B images.

    Attributes:
        logits: float64 [B, classes]; of a network that ends in spikes, the spike counts.
        trace: node name -> array [T, B, ...]: LIF and OrPool bool, Gate uint8, others int32 or
            int64; and "logits". What it holds is chosen by `run(..., record=...)`.
        gates: Gate node -> uint8 [T, B, N], in the order of the blocks, always present.
        events: event counts per node and image, or None if they were not asked for.
        ranges: one entry per LIF node, in topological order.
        steps: T.
    """

    logits: npt.NDArray[np.float64]
    trace: Mapping[str, npt.NDArray]
    gates: Mapping[str, npt.NDArray[np.uint8]]
    events: EventCounts | None
    ranges: tuple[LayerRange, ...]
    steps: int

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """Class of each image, int64 [B]: the largest logit, the lowest index among equals."""
        return np.argmax(self.logits, axis=1)

    @property
    def tokens_per_block(self) -> npt.NDArray[np.float64]:
        """Mean share of open gates, float64 [L, T]; shape [0, T] without gates."""
        if not self.gates:
            return np.zeros((0, self.steps))
        return np.stack([gate.mean(axis=(1, 2)) for gate in self.gates.values()])

    @property
    def average_tokens(self) -> float:
        """Mean over images of open gates / (L * T * N); 1.0 for a network without gates."""
        return float(self.tokens_per_block.mean()) if self.gates else 1.0

    @property
    def out_of_range(self) -> tuple[LayerRange, ...]:
        """The layers whose arithmetic left its range at least once."""
        return tuple(r for r in self.ranges if r.current_wraps or r.voltage_saturations)
