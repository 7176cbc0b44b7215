"""The checkpoint that every cell of a sweep starts from."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from atsnn.config import RunConfig, load_config, merged, parse, read_preset
from atsnn.data import load_dataset
from atsnn.errors import ConfigError
from atsnn.training import CONFIG_FILE, LOG_FILE, train
from hardware.sweep.cell import SWEEP_FILE, load_job
from hardware.sweep.config import SweepConfig, cells_of

START = "start"
"""Folder of the start's run, inside that of the sweep."""
_OTHERS = {"validation_accuracy": "images held out", "test_accuracy": "test images"}


@dataclass(frozen=True)
class Stage:
    """One stage of the start's training, as its log tells it.

    Attributes:
        name: of the stage. seed, steps: of its configuration (steps: time steps T).
        train, watched: accuracy after each epoch, on training images and on others. others: what
            those are.
    """

    name: str
    seed: int
    steps: int
    train: tuple[float, ...]
    watched: tuple[float, ...]
    others: str


def start_stages(checkpoint: Path) -> list[Stage]:
    """Stages of the run that a start came from; none if its folder holds no finished run."""
    folder = checkpoint.parent
    if not (folder / CONFIG_FILE).exists():
        return []
    run = load_config(folder / CONFIG_FILE)
    found = []
    for name, stage in run.stage_configs().items():
        log = (folder / name if run.stages else folder) / LOG_FILE
        if not log.exists():
            return []
        rows = list(csv.DictReader(io.StringIO(log.read_text(encoding="utf-8"))))
        if not rows:
            return []
        watched = next(column for column in _OTHERS if column in rows[0])
        found.append(
            Stage(
                name,
                stage.train.seed,
                stage.model.steps,
                tuple(float(row["train_accuracy"]) for row in rows),
                tuple(float(row[watched]) for row in rows),
                _OTHERS[watched],
            )
        )
    return found


def watched_by_start(checkpoint: Path) -> int | None:
    """Training images that a start's run held out; None if its folder does not say."""
    config = checkpoint.parent / CONFIG_FILE
    return load_config(config).data.validation_images if config.exists() else None


def start_run(sweep: SweepConfig) -> RunConfig:
    """The run that a sweep's `start` describes.

    Raises:
        ConfigError: it describes none, or one that is not valid.
    """
    start = sweep.start
    if start is None:
        raise ConfigError(
            f"{sweep.title}: says nothing of its start; give a checkpoint (--start FILE), or add "
            "a section `start` to the sweep's file"
        )
    preset = {} if start.preset is None else read_preset(start.preset)
    run = parse(RunConfig, merged(preset, start.run), f"{sweep.title}: start")
    wanted = max(cell.run.data.validation_images for cell in cells_of(sweep))
    if run.data.validation_images < wanted:
        raise ConfigError(
            f"{sweep.title}: start holds {run.data.validation_images:,} images out, the sweep "
            f"measures on {wanted:,}; set start.run.data.validation_images to {wanted}"
        )
    return run


def given_before(folder: Path) -> Path | None:
    """The checkpoint that a sweep was begun with; None if it is new or trained its own.

    Raises:
        ConfigError: the folder's `sweep.json` is damaged.
    """
    if not (folder / SWEEP_FILE).exists():
        return None
    start = load_job(folder).start
    return None if start.parent == (folder / START).resolve() else start


def train_start(sweep: SweepConfig, data: str, folder: Path, console: Console) -> Path:
    """Train the start in FOLDER/start, or go on with it; returns its checkpoint.

    Raises:
        ConfigError: see `start_run`, or the folder holds another run.
    """
    run = start_run(sweep)
    first, *_ = run.stage_configs().values()
    dataset = load_dataset(data, run.data, first.model)
    return train(run, dataset, folder / START, resume=True, console=console)
