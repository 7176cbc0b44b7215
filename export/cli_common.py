"""What all commands of `atsnn-export` share: their options, and where output goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from export.errors import UnsupportedTargetError

Report = Callable[[str, int, int], None]

ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Checkpoint file or run folder, or a graph file (.h5); default: the built-in model.",
    ),
]
ImagesOption = Annotated[
    int | None, typer.Option("--images", min=1, metavar="N", help="The first N test images.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder or zip with test images (see `atsnn data`), or 'digits'; default: the "
        "built-in images.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only, on standard output.")]


def choice(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
    return value


def print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    from atsnn.files import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UnsupportedTargetError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def progress_report() -> Iterator[Report]:
    """A meter on stderr for whatever stage reports: `report(stage, done, total)`."""
    from atsnn.progress import Meter

    console = Console(stderr=True)
    meters: dict[str, Meter] = {}
    reached: dict[str, int] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in meters:
            for meter in meters.values():
                meter.__exit__(None, None, None)
            meters[stage] = Meter(stage, total, console).__enter__()
        meters[stage].advance(done - reached.get(stage, 0))
        reached[stage] = done

    try:
        yield report
    finally:
        for meter in meters.values():
            meter.__exit__(None, None, None)
