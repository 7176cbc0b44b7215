"""What a sweep's table says, in numbers: points over seeds, and the two claims put to the test."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

Row = dict[str, str]
LOST = 0.005
"""Accuracy that may be lost where operations are compared: half a point."""


@dataclass(frozen=True)
class Point:
    """One method at one budget: means over its seeds, and the rows behind them.

    Attributes:
        method, budget, group, family: as in the table. label: how the page calls the method.
        rows: finished rows, one per seed.
    """

    method: str
    budget: str
    group: str
    family: str
    label: str
    rows: tuple[Row, ...] = field(repr=False)

    def values(self, column: str) -> list[float]:
        """A column over the seeds; empty where the table does not have it."""
        return [float(row[column]) for row in self.rows if row.get(column, "") != ""]

    def mean(self, column: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values(column))

    def spread(self, column: str) -> tuple[float, float]:
        """Smallest and largest value over seeds."""
        found = self.values(column)
        return min(found), max(found)

    @property
    def seeds(self) -> int:
        """Number of seeds that ended well."""
        return len(self.rows)

    @property
    def name(self) -> str:
        """Label, with the budget where there is one."""
        return self.label if self.budget == "all" else f"{self.label}, {self.budget}"


def points(rows: Iterable[Row], labels: dict[str, str]) -> list[Point]:
    """Finished rows by method and budget, in the order of the table."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            found.setdefault((row["method"], row["budget"]), []).append(row)
    return [
        Point(
            method,
            budget,
            group[0]["group"],
            group[0]["family"],
            labels.get(method) or method,
            tuple(group),
        )
        for (method, budget), group in found.items()
    ]


def reference(found: Iterable[Point]) -> Point | None:
    """All tokens: the point that the others are compared with."""
    return next((point for point in found if point.group == "reference"), None)


@dataclass(frozen=True)
class TokenClaim:
    """Fewest tokens of ours at the accuracy of a rival, and what that saves.

    Attributes:
        rival: the point compared with. ours: the point of ours with the fewest tokens among those
            at least as accurate; None: no point of ours is.
        fewer: share of the rival's average tokens that ours does without.
    """

    rival: Point
    ours: Point | None
    fewer: float | None


def token_claims(found: list[Point], accuracy: str = "accuracy") -> list[TokenClaim]:
    """Each rival point against ours, the most accurate rival first."""
    ours = [point for point in found if point.group == "ours" and point.values(accuracy)]
    rivals = [point for point in found if point.group == "rival" and point.values(accuracy)]
    claims = []
    for rival in sorted(rivals, key=lambda point: -point.mean(accuracy)):
        reached = [p for p in ours if p.mean(accuracy) >= rival.mean(accuracy)]
        best = min(reached, key=lambda p: p.mean("average_tokens"), default=None)
        fewer = None
        if best is not None:
            fewer = 1 - best.mean("average_tokens") / rival.mean("average_tokens")
        claims.append(TokenClaim(rival, best, fewer))
    return claims


@dataclass(frozen=True)
class OperationClaim:
    """Fewest synaptic operations at most `LOST` below all tokens.

    Attributes:
        point: with the fewest SOPs, stem included. lost: accuracy below all tokens.
        fewer: share of the SOPs of all tokens that it does without.
    """

    point: Point
    lost: float
    fewer: float


def operation_claim(found: list[Point], group: str) -> OperationClaim | None:
    """The best point of a group (`ours` or `rival`); None if every one loses more."""
    everything = reference(found)
    if everything is None:
        return None
    floor = everything.mean("accuracy") - LOST
    reached = [p for p in found if p.group == group and p.mean("accuracy") >= floor]
    if not reached:
        return None
    best = min(reached, key=lambda p: p.mean("sops"))
    return OperationClaim(
        best,
        everything.mean("accuracy") - best.mean("accuracy"),
        1 - best.mean("sops") / everything.mean("sops"),
    )
