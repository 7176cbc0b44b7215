"""Tables for the terminal, as rich renderables."""

from __future__ import annotations

from rich.table import Table

from hardware.energy import EnergyTable
from hardware.events import EventCounts
from hardware.verify import VerificationResult


def energy_rich_table(table: EnergyTable) -> Table:
    """System, convention, grade, energy per image, SOPs, MACs."""
    raise NotImplementedError


def verify_rich_table(result: VerificationResult) -> Table:
    """One line per stage: from, to, images, spikes compared, differing, first difference."""
    raise NotImplementedError


def layers_rich_table(all_tokens: EventCounts, adaptive: EventCounts | None = None) -> Table:
    """Events per layer and image; with `adaptive`, all tokens and adaptive side by side."""
    raise NotImplementedError
