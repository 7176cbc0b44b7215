"""Errors of graph, capture, passes, formats and the Lava target."""

from __future__ import annotations

from atsnn.errors import AtsnnError


class GraphError(AtsnnError):
    """A graph that is not well formed: unknown node, open input, wrong shape, wrong order."""


class GraphFormatError(GraphError):
    """A graph file that is truncated, damaged, hostile or of another version."""


class UnsupportedModuleError(AtsnnError):
    """A torch module or operation that capture has no converter for."""


class UnsupportedTargetError(AtsnnError):
    """A graph that a target (Lava, netx, ONNX) cannot hold."""


class LavaUnavailableError(AtsnnError):
    """Lava is not installed for this Python, or does not import."""


class LavaRunError(AtsnnError):
    """A Lava network that failed, died or stalled; names the process where it is known."""
