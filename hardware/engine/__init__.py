"""Bit-exact event-driven executor of quantised graphs: `run(graph, images)`. Needs no torch."""

from hardware.engine.plan import image_axis, select
from hardware.engine.result import EngineResult, LayerRange
from hardware.engine.runner import run

__all__ = ["EngineResult", "LayerRange", "image_axis", "run", "select"]
