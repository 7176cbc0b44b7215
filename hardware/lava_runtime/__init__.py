"""Lava networks in one interpreter: Lava's compiler and process models, without its OS processes.

Importing it imports Lava (`LavaUnavailableError` if it is not there).
"""

import importlib.util

from export.errors import LavaUnavailableError
from export.lava.compat import require_lava

require_lava()
if importlib.util.find_spec("greenlet") is None:
    raise LavaUnavailableError("the in-process Lava runtime needs greenlet: pip install greenlet")

from hardware.lava_runtime.graph import run_graph  # noqa: E402  (needs Lava)
from hardware.lava_runtime.runtime import InProcessRuntime, in_process  # noqa: E402

__all__ = ["InProcessRuntime", "in_process", "run_graph"]
