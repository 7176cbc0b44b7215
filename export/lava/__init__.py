"""Lava target: a quantised graph as a Lava process network, built and run without leaving a trace.

Nothing here imports Lava before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.lava.compat import check_lava, require_lava
    from export.lava.network import LavaNetwork, build_network
    from export.lava.run import run_lava
    from export.lava.watch import job_folder, run_watched

__all__ = [
    "check_lava",
    "require_lava",
    "build_network",
    "LavaNetwork",
    "run_lava",
    "job_folder",
    "run_watched",
]

_MODULES = {
    "check_lava": "compat",
    "require_lava": "compat",
    "build_network": "network",
    "LavaNetwork": "network",
    "run_lava": "run",
    "job_folder": "watch",
    "run_watched": "watch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
