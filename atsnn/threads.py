"""One lock for all compiled kernels, and their number of threads."""

from __future__ import annotations

import threading

KERNELS = threading.RLock()
"""numba's workqueue ends the process if two threads enter parallel kernels at the same time."""


def use_torch_threads() -> None:
    """Run the kernels that follow on as many threads as torch uses."""
    import numba
    import torch

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # pyright: ignore[reportAttributeAccessIssue] numba's config is built at run time
