"""How fast the cores read their L2 caches: the bound of a kernel whose weights lie there."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt

from atsnn.threads import KERNELS
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import Clock, median, timed

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_BYTES = 2**30
"""Read per thread and turn."""


@numba.njit(parallel=True, cache=True)
def _read(arrays: npt.NDArray[np.int64], passes: int) -> npt.NDArray[np.int64]:
    """Read each thread's own row `passes` times; returned, so that no compiler leaves it out."""
    totals = np.zeros(arrays.shape[0] * 8, np.int64)
    for k in numba.prange(arrays.shape[0]):
        row = arrays[k]
        total = np.int64(0)
        for p in range(passes):
            for i in range(row.size):
                total += row[i] ^ p
        totals[k * 8] = total
    return totals


def l2_size() -> int:
    """Bytes of one core's L2 cache.

    Raises:
        BenchmarkError: the system does not say.
    """
    try:
        text = _CACHE.read_text().strip()
    except OSError as error:
        raise BenchmarkError(
            f"{_CACHE}: {error.strerror}; the bound of L2 needs Linux with its cache sizes"
        ) from None
    match = re.fullmatch(r"(\d+)([KM])", text)
    if match is None:
        raise BenchmarkError(f"{_CACHE}: holds {text!r}, expected a size such as 1024K")
    return int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]]


def l2_read_bandwidth(turns: int = 5, clock: Clock = time.perf_counter) -> float:
    """Bytes per second that all of numba's threads read from half of their L2 each; a median.

    Raises:
        BenchmarkError: see `l2_size`.
    """
    threads, size = numba.get_num_threads(), l2_size() // 2
    arrays = np.random.default_rng(0).integers(0, 2**40, (threads, size // 8))
    passes = _BYTES // size
    with KERNELS:
        _read(arrays, 2)
        seconds = median(timed(lambda: _read(arrays, passes), clock) for _ in range(turns))
    return threads * size * passes / seconds
