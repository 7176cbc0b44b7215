"""Compare the spikes of one executor with another's: every layer, step and image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph import Graph

Trace = Mapping[str, npt.NDArray]


@dataclass(frozen=True)
class Difference:
    """The first neuron (in topological order of nodes, then image, then step) that differs."""

    node: str
    image: int
    t: int
    neuron: tuple[int, ...]
    values: tuple[float, float]


@dataclass(frozen=True)
class StageResult:
    """Outcome of one arrow of the chain; `as_json()` has the fixed keys from, to, images, ..."""

    from_stage: str
    to_stage: str
    images: int
    spikes_compared: int
    spikes_differing: int
    first_difference: Difference | None
    nodes_compared: int
    logits_differing: int
    nodes_missing: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.spikes_differing == 0 and self.logits_differing == 0

    def as_json(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class Stage:
    """An executor of the graph: a name and a function images uint8 [B, ...] -> trace."""

    name: str
    trace: Callable[[npt.NDArray[np.uint8]], Trace]
    partial: bool = False
    """True for a stage that may lack inner layers (Lava at grain "blocks")."""


@dataclass(frozen=True)
class VerificationResult:
    """All stages; `as_json()` gives {"stages": [...]}, `equal` is the verdict."""

    stages: tuple[StageResult, ...]

    @property
    def equal(self) -> bool:
        return all(stage.equal for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        return {"stages": [stage.as_json() for stage in self.stages]}


def verify(
    graph: Graph,
    images: npt.NDArray[np.uint8],
    against: Sequence[str | Stage] = ("engine", "lava-layers", "lava-blocks"),
    *,
    reference: Stage | Callable[[npt.NDArray[np.uint8]], Trace] | None = None,
    batch: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerificationResult:
    """Compare reference -> engine, then engine -> each of the other stages, spike by spike.

    Args:
        graph: the quantised graph.
        images: uint8 [B, *input shape], raw 8-bit pixels.
        against: "engine", "lava-layers", "lava-blocks", or a `Stage` of your own.
        reference: default `export.torch_module.torch_trace(graph, images)`.
        batch: images at a time (bounds the memory that traces take).
        progress: called with (stage name, images done, images in all).
    """
    raise NotImplementedError
