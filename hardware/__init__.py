"""Run, verify and price a quantised graph. Names are imported when they are first used.

`verify` is not among them, since `hardware.verify` is a module: use
`from hardware.verify import verify`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardware.energy import EnergyRow, EnergyTable, energy_table
    from hardware.engine import EngineResult, run
    from hardware.events import EventCounts
    from hardware.exits import ExitEngine, ExitResult
    from hardware.placement import Placement, measure, place, placed_cost
    from hardware.variants import open_all_gates
    from hardware.verify import Stage, StageResult, VerificationResult

_HOME = {
    "EnergyRow": "hardware.energy",
    "EnergyTable": "hardware.energy",
    "energy_table": "hardware.energy",
    "EngineResult": "hardware.engine",
    "run": "hardware.engine",
    "EventCounts": "hardware.events",
    "ExitEngine": "hardware.exits",
    "ExitResult": "hardware.exits",
    "open_all_gates": "hardware.variants",
    "Placement": "hardware.placement",
    "place": "hardware.placement",
    "measure": "hardware.placement",
    "placed_cost": "hardware.placement",
    "Stage": "hardware.verify",
    "StageResult": "hardware.verify",
    "VerificationResult": "hardware.verify",
}

__all__ = [
    "EngineResult",
    "run",
    "EventCounts",
    "ExitEngine",
    "ExitResult",
    "open_all_gates",
    "Stage",
    "StageResult",
    "VerificationResult",
    "EnergyRow",
    "EnergyTable",
    "energy_table",
    "Placement",
    "place",
    "measure",
    "placed_cost",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hardware' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
