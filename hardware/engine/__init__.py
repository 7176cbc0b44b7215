"""Bit-exact event-driven executor of quantised graphs: `run(graph, images)`. Needs no torch.

`Engine(graph)` does once what comes before the first image; its `run(images)` may come many times.
"""

from hardware.engine.plan import image_axis, select
from hardware.engine.result import EngineResult, LayerRange
from hardware.engine.runner import Engine, run

__all__ = ["Engine", "EngineResult", "LayerRange", "image_axis", "run", "select"]
