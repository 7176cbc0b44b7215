"""What every comparison shares: timing in turns, medians, the best batch, rows, tables, conditions.

Ours and the peers take turns, so that a busy moment of the machine slows all of them alike. A
figure is a median over the turns. Everything that reads a clock takes it as an argument.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from atsnn.errors import AtsnnError
from atsnn.files import write_atomically
from atsnn.progress import say
from benchmarks.errors import BenchmarkError

Action = Callable[[], Any]
Clock = Callable[[], float]
Value = TypeVar("Value")

LEAST_TURNS = 5
"""Medians of fewer turns are for trying a command out; tables say so."""


@dataclass(frozen=True)
class Comparison:
    """One figure of ours beside one of a peer's.

    Attributes:
        what: what was measured, with its conditions.
        ours, theirs: both in `unit`; of times, medians over the turns.
        peer: who or what stands beside it: a library, or a limit.
        unit: "s" for seconds, "MB" for 10^6 bytes.
    """

    what: str
    ours: float
    peer: str
    theirs: float
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """The peer's figure over ours: above 1 where ours is smaller."""
        return self.theirs / self.ours

    def as_json(self) -> dict[str, Any]:
        """`{"what", "ours_s", "peer", "peer_s", "ratio"}`; other units end in their own name."""
        return {
            "what": self.what,
            f"ours_{self.unit.lower()}": self.ours,
            "peer": self.peer,
            f"peer_{self.unit.lower()}": self.theirs,
            "ratio": round(self.ratio, 3),
        }


@dataclass(frozen=True)
class Section:
    """Comparisons under one title, with the conditions that only they have."""

    name: str
    title: str
    comparisons: Sequence[Comparison]
    notes: Sequence[str] = field(default_factory=tuple)


# --- time ---


def timed(action: Action, clock: Clock = time.perf_counter) -> float:
    """Seconds that `action` takes."""
    start = clock()
    action()
    return clock() - start


def take_turns(
    actions: Mapping[str, Action],
    turns: int = LEAST_TURNS,
    clock: Clock = time.perf_counter,
    after: Callable[[str], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each action in each turn: first all of them once, then all of them again.

    Args:
        actions: by name; run in this order. They are warm already: nothing is thrown away here.
        turns: how often.
        after: called with the name after each run, for progress.

    Raises:
        BenchmarkError: fewer than one turn.
    """
    if turns < 1:
        raise BenchmarkError(f"{turns} turns asked for; a median needs at least 1")
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(turns):
        for name, action in actions.items():
            times[name].append(timed(action, clock))
            if after is not None:
                after(name)
    return times


def median(values: Iterable[float]) -> float:
    """Median of the turns."""
    return statistics.median(values)


def median_difference(whole: Iterable[float], part: Iterable[float], what: str) -> float:
    """Median over the turns of what a run takes longer than the run of a part in the same turn.

    Raises:
        BenchmarkError: it is not above 0: the machine is too busy, or the runs are too short.
    """
    found = median(differences(whole, part))
    if found <= 0:
        raise BenchmarkError(
            f"{what}: the run with it takes {found:.2g} s longer than the run without it, so noise "
            "is larger than what is measured; stop other programs, or take more images or turns"
        )
    return found


def differences(whole: Iterable[float], part: Iterable[float]) -> list[float]:
    """What a run takes longer than the run of a part, turn by turn."""
    return [a - b for a, b in zip(whole, part, strict=True)]


def medians(times: Mapping[str, Iterable[float]]) -> dict[str, float]:
    """Median of each action's turns."""
    return {name: median(values) for name, values in times.items()}


def fastest(
    candidates: Iterable[Value],
    attempt: Callable[[Value], Any],
    tries: int = 2,
    clock: Clock = time.perf_counter,
) -> Value:
    """The candidate whose best try takes the least time; the earlier one of two equals.

    Each candidate is attempted once more before, untimed, so that compilation does not count.
    """
    best: dict[Value, float] = {}
    for candidate in candidates:
        action = partial(attempt, candidate)
        action()
        best[candidate] = min(timed(action, clock) for _ in range(tries))
    return min(best, key=lambda candidate: best[candidate])


def bisected(
    figure: Callable[[float], float],
    low: float,
    high: float,
    target: float,
    tolerance: float,
    what: str,
) -> tuple[float, float]:
    """Knob between `low` and `high` at which a rising `figure` is within `tolerance` of `target`.

    Returns the knob and the figure there.

    Raises:
        BenchmarkError: 24 halvings do not get there; names `what` and the closest figure.
    """
    closest = (low, float("inf"))
    for _ in range(24):
        knob = (low + high) / 2
        found = figure(knob)
        if abs(found - target) < abs(closest[1] - target):
            closest = (knob, found)
        if abs(found - target) <= tolerance:
            return closest
        low, high = (knob, high) if found < target else (low, knob)
    raise BenchmarkError(
        f"{what}: {target:g} is out of reach, the closest is {closest[1]:.4g}; choose another "
        "target or a wider tolerance"
    )


# --- conditions ---


class ClockName(str, Enum):
    """What is counted: the time that passes, or what this process computes."""

    wall = "wall"
    cpu = "cpu"

    def clock(self, threads: Mapping[str, int]) -> Clock:
        """The clock itself.

        Raises:
            BenchmarkError: CPU time of several threads, which adds up what they do at once.
        """
        if self is ClockName.wall:
            return time.perf_counter
        many = [f"{name} {count}" for name, count in threads.items() if count > 1]
        if many:
            raise BenchmarkError(
                "CPU time adds up what threads do at once, and there are several "
                f"({', '.join(many)} threads): set OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1, or take "
                "the wall clock"
            )
        return time.process_time

    @property
    def label(self) -> str:
        return {"wall": "wall-clock time", "cpu": "CPU time of one thread"}[self.value]


TurnsOption = Annotated[int, typer.Option(min=1, help="Turns of each median.")]
ClockOption = Annotated[
    ClockName, typer.Option(help="cpu: CPU time of one thread, for a machine that others use.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that a user can cause end in one line on stderr and exit status 1."""
    try:
        yield
    except AtsnnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def versions(packages: Iterable[str]) -> str:
    """Python and packages with their versions; those that are absent are left out."""
    found = [f"Python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name of the processor, as the system tells it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.M) if path.exists() else []
    return names[0].strip() if names else platform.machine() or "unknown processor"


def conditions(
    packages: Iterable[str], threads: Mapping[str, int], turns: int, clock: ClockName
) -> str:
    """One line: versions, threads, cores, load, turns and clock."""
    who = ", ".join(f"{name} {count}" for name, count in threads.items())
    few = "" if turns >= LEAST_TURNS else f" (fewer than {LEAST_TURNS}: a trial, not a result)"
    return (
        f"{versions(packages)}; threads: {who}; {cores()} of {os.cpu_count()} cores of "
        f"{processor()}, load average {os.getloadavg()[0]:.1f}; medians of {turns} turns{few}, "
        f"{clock.label}"
    )


# --- output ---


def as_json(sections: Iterable[Section]) -> str:
    """All comparisons as one list."""
    return json.dumps([c.as_json() for s in sections for c in s.comparisons], indent=2)


def quantity(value: float, unit: str) -> str:
    """A figure with three digits and its unit; short times in milli- or microseconds."""
    if unit == "s" and value < 0.1:
        factor, unit = (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
        value *= factor
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} {unit}"


def _cells(comparison: Comparison) -> tuple[str, str, str, str, str]:
    return (
        comparison.what,
        quantity(comparison.ours, comparison.unit),
        comparison.peer,
        quantity(comparison.theirs, comparison.unit),
        f"{comparison.ratio:.2f}",
    )


HEADINGS = ("what", "ours", "beside", "theirs", "ratio")


def show(section: Section, console: Console) -> None:
    """A section as a table on a terminal, as plain lines elsewhere."""
    if not console.is_terminal:
        say(console, f"\n{section.title}")
        for comparison in section.comparisons:
            what, ours, peer, theirs, ratio = _cells(comparison)
            say(console, f"  {ratio:>6} x  ours {ours}, {peer} {theirs}: {what}")
    else:
        table = Table(title=section.title, title_justify="left")
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if index in (1, 3, 4) else "left")
        for comparison in section.comparisons:
            table.add_row(*_cells(comparison))
        console.print(table)
    for note in section.notes:
        say(console, f"  {note}")


def markdown(section: Section, conditions_line: str) -> str:
    """A section as Markdown: table, notes, conditions."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---:|---|---:|---:|"]
    lines += [f"| {' | '.join(_cells(comparison))} |" for comparison in section.comparisons]
    paragraphs = [*section.notes, conditions_line]
    return "\n".join([*lines, "", *(f"* {text}." for text in paragraphs)])


def around(path: Path, name: str) -> tuple[str, str]:
    """What a page has before and after the text of a table, with the table's marks.

    The marks are `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        BenchmarkError: the page is missing or has no such pair of marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise BenchmarkError(f"{path}: has no place for this table; add {begin} and {end}")
    return before + begin, end + after


def insert(path: Path, name: str, text: str) -> None:
    """Replace the text of a table in a page.

    Raises:
        BenchmarkError: see `around`.
    """
    before, after = around(path, name)
    write_atomically(path, f"{before}\n{text}\n{after}".encode())
