"""A pass: a frozen dataclass whose fields are its options, `Graph -> Graph`, valid in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from export.graph import Graph
from export.validation import validate


@dataclass(frozen=True)
class GraphPass(ABC):
    """Base of all passes; calling one validates the graph before and after."""

    def __call__(self, graph: Graph) -> Graph:
        return validate(self.rewrite(validate(graph)))

    @abstractmethod
    def rewrite(self, graph: Graph) -> Graph:
        """The pass itself, on a valid graph."""
