"""Errors of the benchmarks."""

from __future__ import annotations

from atsnn.errors import AtsnnError


class BenchmarkError(AtsnnError):
    """A comparison that cannot be carried out here: a missing peer, tool, file or system call."""
