"""Graphs that stand beside the adaptive one in a comparison."""

from __future__ import annotations

from export.graph import Graph


def open_all_gates(graph: Graph) -> Graph:
    """The same network with all tokens: gates, halting scores and merges removed, still valid."""
    raise NotImplementedError
