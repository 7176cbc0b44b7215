"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY = 30.0
"""Seconds between plain lines."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f}/s", style="progress.data.speed")


class Meter:
    """Shows how far `total` units of work have come, how fast, and how long the rest takes.

    Args:
        title: what is being done. total: units of work. done: units done before the start.
        console: where it is shown; a bar on a terminal, plain lines otherwise.
    """

    def __init__(self, title: str, total: int, console: Console, done: int = 0) -> None:
        self._title, self._total, self._console = title, total, console
        self._done = self._first = done
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if console.is_terminal:
            bar = self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report that `units` more are done."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, advance=units, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            rate = (self._done - self._first) / (now - self._start)
            left = (self._total - self._done) / rate if rate else float("inf")
            say(
                self._console,
                f"{self._title}: {self._done}/{self._total}, {rate:.1f}/s, "
                f"{duration(left)} left{', ' + note if note else ''}",
            )


def say(console: Console, text: str) -> None:
    """Print one line as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
