"""Tables on standard output: as wide as the terminal, and never with a number cut short."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

PLAIN_WIDTH = 160
"""Columns where there is no terminal."""


def print_table(table: Table) -> None:
    """Print a table; where its numbers, and columns that do not wrap, need more room than the
    terminal has, it is wider.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    if _measured(table, console).maximum > console.width:
        _narrow(table, console)
    console.print(table)


def _measured(what: RenderableType, console: Console) -> Measurement:
    """Least and natural width, whatever the console's is."""
    return Measurement.get(console, console.options.update(max_width=10_000), what)


def _narrow(table: Table, console: Console) -> None:
    """Words of headings below one another, text wrapped, numbers whole."""
    for column in table.columns:
        column.overflow = "fold"
        if column.justify == "right" or column.no_wrap:
            column.header = str(column.header).replace(" ", "\n")
            column.no_wrap = True
            parts = (column.header, *column.cells)
            column.min_width = max(_measured(part, console).maximum for part in parts)
    console.width = max(console.width, _measured(table, console).minimum)
