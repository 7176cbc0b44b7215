"""Freed memory stays with the process, and goes back at the end."""

import json
import sys

import pytest
from tiny_runs import run_python

ALLOCATE = """
import json, resource
import torch
from atsnn.memory import kept_memory

def faults(count=5):
    for _ in range(10):  # until the heap has its holes in the right places
        torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1)
with kept_memory():
    within = faults()
print(json.dumps([within, faults()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_pages_of_64_mb_are_cleared_once_within_and_each_time_after() -> None:
    result = run_python(ALLOCATE)
    assert result.returncode == 0, result.stderr
    within, after = json.loads(result.stdout)
    pages_at_least = 5 * 64_000_000 // 2**21  # of 2 MB, where the system gives huge pages
    assert within < pages_at_least < after
