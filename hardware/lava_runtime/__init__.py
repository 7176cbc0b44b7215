"""Lava networks in one interpreter: Lava's compiler and process models, without its OS processes.

Importing it imports Lava (`LavaUnavailableError` if it is not there).
"""

from export.lava.compat import require_lava

require_lava()

from hardware.lava_runtime.runtime import InProcessRuntime, in_process  # noqa: E402  (needs Lava)

__all__ = ["InProcessRuntime", "in_process"]
