"""`atsnn-export exits`: what images cost that leave once the read-out is sure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atsnn.errors import ExitError
from atsnn.tables import print_table
from export.cli_common import (
    DataOption,
    ImagesOption,
    JsonOption,
    ModelArgument,
    print_json,
    progress_report,
)  # fmt: skip
from export.errors import UnsupportedTargetError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from atsnn.spikformer import Spikformer
    from export.built_in import Images
    from hardware.exits import ExitResult

Register = Callable[[str], Callable[[Callable[..., None]], Callable[..., None]]]


def register(command: Register) -> None:
    """Add the command of this module to the command line."""
    command("exits")(exits_command)


def exits_command(
    model: ModelArgument = None,
    margin: Annotated[
        list[float] | None,
        typer.Option(
            "--margin",
            metavar="M",
            help="Images leave once their two largest logits differ by M; may be repeated.",
        ),
    ] = None,
    decay: Annotated[
        float,
        typer.Option("--decay", metavar="F", help="Factor on the margin from step to step."),
    ] = 1.0,
    images: ImagesOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let images leave once they are sure: accuracy, steps and operations for each margin."""
    from export.built_in import load_images, load_subject

    margins = _margins(margin or [])
    subject = load_subject(model)
    if subject.model is None:
        raise UnsupportedTargetError(
            f"{subject.name} is a graph of {subject.graph.steps} steps, whose read-out is rounded "
            "for them; exits need the checkpoint it came from"
        )
    tested = load_images(subject.graph, images, data)
    rows = _rows(subject.model, tested, margins, decay)
    if as_json:
        print_json({"model": subject.name, "images": len(tested), "decay": decay, "rows": rows})
        return
    from hardware.report import exits_rich_table

    print_table(exits_rich_table(rows, len(tested)))


def _margins(given: Sequence[float]) -> list[float]:
    if not given:
        raise ExitError("no margin: give at least one --margin M, a difference of two logits")
    for margin in given:
        if not 0 < margin < math.inf:
            raise ExitError(
                f"--margin {margin:g}: give a number above 0, a difference of two logits"
            )
    return sorted(set(given), reverse=True)


def _rows(
    model: Spikformer, tested: Images, margins: Sequence[float], decay: float
) -> list[dict[str, Any]]:
    """First without an exit, then the margins from the largest, at which most images stay."""
    from hardware.exits import ExitEngine

    engine = ExitEngine(model)
    rows: list[dict[str, Any]] = []
    with progress_report() as report:
        for margin in (math.inf, *margins):
            name = f"margin {margin:g}" if margin < math.inf else "no exit"
            tick = functools.partial(report, name)
            result = engine.run(tested.pixels, margin, decay=decay, progress=tick)
            rows.append(_row(result, margin, tested.labels))
    whole = rows[0]["sops"]
    return [{**row, "sops_saved": 1 - row["sops"] / whole if whole else 0.0} for row in rows]


def _row(result: ExitResult, margin: float, labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "margin": margin if margin < math.inf else None,
        "accuracy": float((result.classes == labels).mean()),
        "mean_steps": result.mean_steps,
        "average_tokens": result.average_tokens,
        "sops": result.events.mean("sops"),
        "leaving": result.leaving.tolist(),
    }
