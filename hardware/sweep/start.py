"""The checkpoint that every cell of a sweep starts from."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from atsnn.config import RunConfig, merged, parse, read_preset
from atsnn.data import load_dataset
from atsnn.errors import ConfigError
from atsnn.training import train
from hardware.sweep.cell import SWEEP_FILE, load_job
from hardware.sweep.config import SweepConfig

START = "start"
"""Folder of the start's run, inside that of the sweep."""


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
    return parse(RunConfig, merged(preset, start.run), f"{sweep.title}: start")


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
