"""Freed memory stays with the process, and goes back at the end."""

import json
import sys

import pytest
from tiny_runs import run_python

ALLOCATE = """
import json, resource
import torch
from atsnn.memory import kept_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.ones(16_000_000)
before = resident()
with kept_memory():
    for _ in range(10):  # until the heap has its holes in the right places
        torch.ones(16_000_000)
    within, first = resident(), faults()
    for _ in range(5):
        torch.ones(16_000_000)
    cleared = faults() - first
print(json.dumps([within - before, resident() - before, cleared]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_a_freed_block_of_64_mb_stays_without_new_pages_and_goes_back_at_the_end() -> None:
    result = run_python(ALLOCATE)
    assert result.returncode == 0, result.stderr
    within, after, cleared = json.loads(result.stdout)
    assert within > 60_000_000
    assert after < 20_000_000
    assert cleared < 5 * 64_000_000 // 2**21  # pages of 2 MB, where the system gives huge ones
