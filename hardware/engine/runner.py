"""Drive the executors of a graph over batches of images and over time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.graph import Graph
from hardware.engine.result import EngineResult

Record = Literal["none", "spikes", "all"] | Collection[str]


def run(
    graph: Graph,
    images: npt.NDArray[np.uint8],
    *,
    record: Record = "spikes",
    count_events: bool = True,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EngineResult:
    """Run a quantised graph on images, to the last spike what the cores would do.

    Args:
        graph: a quantised graph.
        images: raw 8-bit pixels, uint8 [B, *input shape]; the engine keeps the upper `Input.bits`.
            A graph whose input has 1 bit also takes events, [T, B, *input shape] of 0 and 1.
        record: what `EngineResult.trace` holds: "spikes" (LIF, OrPool and Gate nodes, and logits),
            "all" (every node), "none" (logits only), or the names of nodes.
        count_events: False leaves `EngineResult.events` None and saves about a third of the time.
        batch: images at a time; by default as many as keep a batch near 64 MB.
        progress: called with (images done, images in all) after each batch.

    Raises:
        EngineError: the graph is not quantised or holds what the engine cannot run, or the images
            are of another size or type; the message names both sizes.
    """
    raise NotImplementedError
