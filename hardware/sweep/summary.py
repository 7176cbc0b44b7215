"""What a sweep's table says, in numbers: points over seeds, and the two claims put to the test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

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

    def of_seeds(self, seeds: Collection[str]) -> Point:
        """The same point with the rows of these seeds alone."""
        return replace(self, rows=tuple(row for row in self.rows if row["seed"] in seeds))

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


def paired(first: Point, second: Point) -> tuple[Point, Point] | None:
    """Both on the seeds that both have; None if they share none."""
    shared = {row["seed"] for row in first.rows} & {row["seed"] for row in second.rows}
    return (first.of_seeds(shared), second.of_seeds(shared)) if shared else None


def standard_error(point: Point) -> float:
    """Of the point's accuracy, from the number of images alone."""
    accuracy = point.mean("accuracy")
    return math.sqrt(accuracy * (1 - accuracy) / float(point.rows[0]["images"]))


def reference(found: Iterable[Point]) -> Point | None:
    """All tokens: the point that the others are compared with."""
    return next((point for point in found if point.group == "reference"), None)


@dataclass(frozen=True)
class TokenClaim:
    """Fewest tokens of ours at the accuracy of a rival, and what that saves.

    Attributes:
        rival: the point compared with, on the seeds of both. ours: the point of ours with the
            fewest tokens among those at least as accurate on the same seeds; None: no point is.
        fewer: share of the rival's average tokens that ours does without.
        candidates: points of ours that it was chosen from.
    """

    rival: Point
    ours: Point | None
    fewer: float | None
    candidates: int


def token_claims(found: list[Point]) -> list[TokenClaim]:
    """Each rival point against ours, the most accurate rival first."""
    ours = [point for point in found if point.group == "ours"]
    rivals = [point for point in found if point.group == "rival"]
    return [
        _token_claim(rival, [pair for mine in ours if (pair := paired(mine, rival))])
        for rival in sorted(rivals, key=lambda point: -point.mean("accuracy"))
    ]


def _token_claim(rival: Point, pairs: list[tuple[Point, Point]]) -> TokenClaim:
    reached = [(ours, it) for ours, it in pairs if ours.mean("accuracy") >= it.mean("accuracy")]
    if not reached:
        return TokenClaim(rival, None, None, len(pairs))
    ours, it = min(reached, key=lambda pair: _tokens(pair[0]) / _tokens(pair[1]))
    return TokenClaim(it, ours, 1 - _tokens(ours) / _tokens(it), len(pairs))


def _tokens(point: Point) -> float:
    return point.mean("average_tokens")


@dataclass(frozen=True)
class OperationClaim:
    """Fewest synaptic operations at most `LOST` below all tokens.

    Attributes:
        point: with the fewest SOPs, stem included, on the seeds that all tokens have as well.
        lost: accuracy below all tokens. fewer: share of their SOPs that it does without.
    """

    point: Point
    lost: float
    fewer: float


def operation_claim(found: list[Point], group: str) -> OperationClaim | None:
    """The best point of a group (`ours` or `rival`); None if every one loses more."""
    everything = reference(found)
    if everything is None:
        return None
    pairs = [pair for p in found if p.group == group and (pair := paired(p, everything))]
    reached = [
        OperationClaim(
            point,
            them.mean("accuracy") - point.mean("accuracy"),
            1 - point.mean("sops") / them.mean("sops"),
        )
        for point, them in pairs
        if point.mean("accuracy") >= them.mean("accuracy") - LOST
    ]
    return max(reached, key=lambda claim: claim.fewer, default=None)
