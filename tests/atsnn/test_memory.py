"""Freed memory stays with the process, and goes back at the end."""

import resource
import sys

import pytest
import torch

from atsnn.memory import kept_memory


def faults_of_allocations(count: int = 5) -> int:
    """Page faults while 64 MB are allocated, written and freed again and again."""
    torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_pages_are_cleared_once_within_and_each_time_after() -> None:
    with kept_memory():
        within = faults_of_allocations()
    after = faults_of_allocations()
    assert within < 100
    assert after > 10 * within
