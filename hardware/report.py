"""Tables for the terminal, as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from hardware.energy import EnergyRow, EnergyTable
from hardware.engine import EngineResult
from hardware.events import EventCounts, NodeEvents
from hardware.verify import StageResult, VerificationResult

_JOULE_PREFIXES = ((1.0, "J"), (1e-3, "mJ"), (1e-6, "uJ"), (1e-9, "nJ"), (1e-12, "pJ"))
_COUNT_PREFIXES = ((1e9, " G"), (1e6, " M"), (1e3, " k"))


def format_joules(joules: float) -> str:
    """Three significant digits with a prefix: 0.000734 -> "734 uJ"."""
    rounded = float(f"{joules:.3g}")
    for factor, unit in _JOULE_PREFIXES:
        if rounded >= factor:
            return f"{_digits(rounded / factor)} {unit}"
    return f"{_digits(rounded / 1e-12)} pJ"


def format_count(count: float) -> str:
    """Three significant digits with a prefix: 4682000 -> "4.68 M"."""
    rounded = float(f"{count:.3g}")
    for factor, unit in _COUNT_PREFIXES:
        if rounded >= factor:
            return f"{_digits(rounded / factor)}{unit}"
    return _digits(rounded)


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def energy_rich_table(table: EnergyTable) -> Table:
    """System, convention, grade, energy per image, SOPs, MACs; one section per system."""
    out = Table(title=f"Energy per image (mean over {table.images} images)")
    for heading in ("system", "convention", "grade"):
        out.add_column(heading)
    for heading in ("energy", "SOPs", "MACs"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(table.rows, (*table.rows[1:], None), strict=True):
        out.add_row(
            row.system,
            row.convention,
            row.grade,
            _energy(row),
            format_count(row.sops) if row.sops else "-",
            format_count(row.macs) if row.macs else "-",
            end_section=following is None or following.system != row.system,
        )
    out.caption = " ".join(_energy_notes(table))
    return out


def _energy_notes(table: EnergyTable) -> list[str]:
    notes = ["Joules of different conventions must not be compared."]
    if table.adaptive is not table.all_tokens:
        tokens = f"{table.average_tokens:.1%} (open gates / (blocks x steps x tokens))"
        notes.insert(0, f"Average tokens {tokens}.")
    unique = dict.fromkeys(row.note for row in table.rows if row.note)
    return notes + [f"{note[0].upper()}{note[1:]}." for note in unique]


def _energy(row: EnergyRow) -> str:
    if row.joules_low == row.joules_high:
        return format_joules(row.joules_per_image)
    return f"{format_joules(row.joules_low)} ... {format_joules(row.joules_high)}"


def verify_rich_table(result: VerificationResult) -> Table:
    """One line per stage: from, to, images, layers, compared, differing, first difference."""
    out = Table(title="Spikes compared, every layer and time step")
    for heading in ("from", "to"):
        out.add_column(heading)
    for heading in ("images", "layers", "compared", "differing"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("first difference")
    for stage in result.stages:
        out.add_row(
            stage.from_stage,
            stage.to_stage,
            str(stage.images),
            str(stage.nodes_compared),
            f"{stage.spikes_compared:,}",
            str(stage.spikes_differing),
            _difference(stage),
        )
    return out


def _difference(stage: StageResult) -> str:
    if stage.first_difference is None:
        return "none: equal"
    return str(stage.first_difference)


def layers_rich_table(all_tokens: EventCounts, adaptive: EventCounts | None = None) -> Table:
    """Events per layer and image; with `adaptive`, all tokens and adaptive side by side."""
    if adaptive is all_tokens:  # a network without gates
        adaptive = None
    shown = adaptive or all_tokens
    out = Table(title=f"Events per layer and image (mean over {shown.images} images)")
    out.add_column("layer")
    out.add_column("kind")
    headings = ["SOPs, all tokens", "SOPs, adaptive"] if adaptive else ["SOPs"]
    for heading in (*headings, "ACs", "MACs", "spikes", "updates", "gated off"):
        out.add_column(heading, justify="right")
    before = {node.name: node for node in all_tokens.nodes}
    for node in shown.nodes:
        if node.kind in ("Reshape", "Output"):
            continue
        known = before.get(node.name)
        both = [format_count(known.mean("sops")) if known else "-"] if adaptive else []
        out.add_row(node.name, _kind(node), *both, *_counts(node))
    both = [format_count(all_tokens.mean("sops"))] if adaptive else []
    out.add_section()
    out.add_row("all layers", "", *both, *_counts(shown))
    return out


def _kind(node: NodeEvents) -> str:
    return f"{node.kind}, {node.order}" if node.order else node.kind


def _counts(events: NodeEvents | EventCounts) -> list[str]:
    updates = events.mean("updates_active") + events.mean("updates_idle")
    means = [events.mean(name) for name in ("sops", "acs", "macs", "spikes")]
    return [format_count(n) for n in (*means, updates, events.mean("updates_gated"))]


def exits_rich_table(rows: Sequence[Mapping[str, Any]], images: int) -> Table:
    """One line per margin: what `atsnn-export exits --json` has as `rows`.

    `margin` (None: no exit), `accuracy`, `mean_steps`, `average_tokens`, `sops`, `sops_saved` (of
    those without an exit) and `leaving` (images that leave after each step).
    """
    out = Table(title=f"Exit over time steps (mean over {images} images)")
    out.add_column("margin")
    for heading in ("accuracy", "steps", "tokens", "SOPs", "saved"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("images leaving after each step", justify="right")
    for row in rows:
        out.add_row(
            "no exit" if row["margin"] is None else f"{row['margin']:g}",
            f"{row['accuracy']:.2%}",
            f"{row['mean_steps']:.3g}",
            f"{row['average_tokens']:.1%}",
            format_count(row["sops"]),
            "" if row["margin"] is None else f"{row['sops_saved']:.1%}",
            " ".join(str(count) for count in row["leaving"]),
        )
    out.caption = "Tokens: open gates / (blocks x steps x tokens), closed behind the exit."
    return out


def tokens_rich_table(result: EngineResult) -> Table:
    """Share of open gates per block and time step, mean over the images."""
    out = Table(title=f"Open gates per block and step (average tokens {result.average_tokens:.1%})")
    out.add_column("gate")
    for t in range(result.steps):
        out.add_column(f"t = {t}", justify="right")
    for name, shares in zip(result.gates, result.tokens_per_block, strict=True):
        out.add_row(name, *(f"{share:.1%}" for share in shares))
    return out
