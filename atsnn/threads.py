"""One lock for all compiled kernels."""

from __future__ import annotations

import threading

KERNELS = threading.RLock()
"""numba's workqueue ends the process if two threads enter parallel kernels at the same time."""
