"""Tables keep their numbers, however narrow the terminal is."""

import pytest
from rich.table import Table
from rich.text import Text

from atsnn.tables import print_table

NUMBERS = ("12,345,678", "0.0123 uJ", "96 mJ ... 1.15 J")


def wide_table() -> Table:
    table = Table()
    table.add_column("a system with a long name that wraps")
    table.add_column("id", no_wrap=True)
    for heading in ("synaptic operations", "energy", "range of the rival"):
        table.add_column(heading, justify="right")
    table.add_row("a network of many words " * 4, "method@budget-s0", *NUMBERS)
    return table


@pytest.mark.parametrize("width", ["20", "60", "80", "200"])
def test_numbers_names_and_headings_stay_whole(capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", width)
    print_table(wide_table())
    shown = capsys.readouterr().out
    for whole in (*NUMBERS, "method@budget-s0", "operations", "energy", "rival"):
        assert whole in shown
    assert "…" not in shown


def test_a_table_is_no_wider_than_it_needs_to_be(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    print_table(wide_table())
    shown = Text.from_ansi(capsys.readouterr().out).plain
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_without_a_terminal_the_width_is_fixed(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(wide_table())
    piped = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "40")
    print_table(wide_table())
    assert capsys.readouterr().out == piped
