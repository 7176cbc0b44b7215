"""One cell of a sweep, in an interpreter of its own: `python -m hardware.sweep.cell FOLDER ID`.

Trains (or goes on training), deploys on the validation images, and leaves `result.json` and
`details.npz` in the cell's folder. With `--test` it deploys a finished cell on the test images and
leaves `test.json`. It ends when its standard input does, so that it does not outlive its sweep.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from atsnn.checkpoint import MODEL_FILE, load_model
from atsnn.config import RunConfig, merged, parse
from atsnn.data import Dataset, ImageSet, load_dataset
from atsnn.errors import AtsnnError, ConfigError, DatasetError
from atsnn.spikformer import Spikformer
from atsnn.training import LOG_FILE, initial_model, train
from hardware.sweep.config import Cell, SweepConfig, cells_of, parse_sweep
from hardware.sweep.files import write_file, write_json
from hardware.sweep.measure import Deployed, deploy

SWEEP_FILE, RESULT_FILE, TEST_FILE = "sweep.json", "result.json", "test.json"
DETAILS_FILE, CELLS = "details.npz", "cells"


@dataclass(frozen=True)
class Job:
    """What a sweep's folder says about all of its cells.

    Attributes:
        folder: of the sweep. data: as in `atsnn train --data`. start: checkpoint of all cells.
        threads: torch threads of each cell; None: torch's choice.
    """

    folder: Path
    sweep: SweepConfig
    data: str
    start: Path
    threads: int | None

    def save(self) -> None:
        """Write `sweep.json`."""
        values = {
            "sweep": self.sweep.model_dump(mode="json", exclude_unset=True),
            "data": self.data,
            "start": str(self.start),
            "threads": self.threads,
        }
        write_json(self.folder / SWEEP_FILE, values)

    def cell(self, name: str) -> Cell:
        """A cell of the grid by its id."""
        for cell in cells_of(self.sweep):
            if cell.id == name:
                return cell
        raise ConfigError(f"{self.folder}: the sweep has no cell {name}")

    def place(self, cell: Cell | str) -> Path:
        """Folder of a cell."""
        return self.folder / CELLS / (cell if isinstance(cell, str) else cell.id)

    def fingerprint(self, cell: Cell) -> str:
        """Digest of all that determines a cell's result, apart from the images themselves.

        Defaults stay out, so that a version with more options still knows its cells.
        """
        start = hashlib.sha256(self.start.read_bytes()).hexdigest()
        values = [
            cell.run.model_dump(mode="json", exclude_defaults=True),
            cell.source,
            start,
            self.sweep.verify_images,
            self.sweep.measure_images,
        ]
        deploy = cell.deploy.model_dump(mode="json", exclude_defaults=True)
        values += [deploy] if deploy else []
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_job(folder: Path) -> Job:
    """Read `sweep.json`.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / SWEEP_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sweep = parse_sweep(values["sweep"], str(path))
        return Job(folder, sweep, values["data"], Path(values["start"]), values["threads"])
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds no sweep ({SWEEP_FILE} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); start the sweep in another folder") from None


def run_cell(job: Job, cell: Cell, console: Console) -> dict[str, Any]:
    """Train and deploy one cell; returns its columns, which are also written to its folder."""
    place = job.place(cell)
    dataset = load_dataset(job.data, cell.run.data, _last(cell).model)
    if dataset.validation is None:
        raise DatasetError(
            f"{job.data}: no images are held out; set run.data.validation_images, since every "
            "choice is made on them"
        )
    images: ImageSet = dataset.validation
    if job.sweep.measure_images is not None:
        images = images.first(job.sweep.measure_images)
    model, training = _model(job, cell, dataset, console)
    begun = time.monotonic()
    deployed = deploy(model, images, job.sweep.verify_images, cell.deploy)
    seconds = training["seconds"] + time.monotonic() - begun
    _write_details(place, deployed, dataset, images if job.sweep.show_images else None)
    numbers = {**training, **deployed.numbers, "seconds": round(seconds, 1)}
    result = {"status": "done", "error": "", "fingerprint": job.fingerprint(cell), **numbers}
    write_json(place / RESULT_FILE, result)
    return result


def deploy_on_test(job: Job, cell: Cell) -> dict[str, Any]:
    """Deploy a finished cell on the test images, once.

    Raises:
        ConfigError: it is not finished, or the test images were used for it before.
    """
    place = job.place(cell)
    if (place / TEST_FILE).exists():
        raise ConfigError(f"{cell.id}: its test result is there already; test images are used once")
    if not (place / RESULT_FILE).exists():
        raise ConfigError(f"{cell.id}: not finished; run the sweep first")
    dataset = load_dataset(job.data, cell.run.data, _last(cell).model)
    deployed = deploy(
        _deployed_model(job, cell, dataset),
        dataset.test,
        job.sweep.verify_images,
        cell.deploy,
    )
    write_json(place / TEST_FILE, deployed.numbers)
    return deployed.numbers


def _last(cell: Cell) -> RunConfig:
    return list(cell.run.stage_configs().values())[-1]


def _model(
    job: Job, cell: Cell, dataset: Dataset, console: Console
) -> tuple[Spikformer, dict[str, Any]]:
    """The deployed model of a cell, and columns about its training."""
    if cell.source is None:
        run, place = _started(job, cell), job.place(cell)
        train(run, dataset, place, resume=True, console=console, memory=job.folder)
        epochs = [stage.train.epochs for stage in cell.run.stage_configs().values()]
        training = {"epochs": sum(epochs), "seconds": _logged_seconds(job.place(cell))}
    else:
        training = {"epochs": 0, "seconds": 0.0}
    return _deployed_model(job, cell, dataset), training


def _started(job: Job, cell: Cell) -> RunConfig:
    values = cell.run.model_dump(mode="json", exclude_unset=True)
    own = {"initial": str(job.start), **({"threads": job.threads} if job.threads else {})}
    return parse(RunConfig, merged(values, {"train": own}), f"cell {cell.id}")


def _deployed_model(job: Job, cell: Cell, dataset: Dataset) -> Spikformer:
    """The trained model; of a cell without training, its source's weights in its own model."""
    if cell.source is None:
        return load_model(job.place(cell) / MODEL_FILE)
    checkpoint = job.place(cell.source) / MODEL_FILE
    values = _last(cell).model_dump(mode="json", exclude_unset=True, exclude={"stages"})
    run = parse(RunConfig, values, f"cell {cell.id}")
    return initial_model(run, checkpoint, dataset.train).eval()


def _logged_seconds(place: Path) -> float:
    rows = [
        row
        for log in [place / LOG_FILE, *place.glob(f"*/{LOG_FILE}")]
        if log.exists()
        for row in csv.DictReader(io.StringIO(log.read_text()))
    ]
    return sum(float(row["seconds"]) for row in rows)


def _write_details(
    place: Path, deployed: Deployed, dataset: Dataset, images: ImageSet | None
) -> None:
    stream = io.BytesIO()
    details = {**deployed.details, "classes": np.array(dataset.classes)}
    if images is not None:
        details["images"] = images.batch(torch.arange(len(details["labels"]))).numpy()
    np.savez_compressed(stream, **details)  # pyright: ignore[reportArgumentType] names are ours
    write_file(place / DETAILS_FILE, stream.getvalue())


def main(arguments: list[str]) -> int:
    """Run one cell; the last line on stderr says what went wrong."""
    folder, name, *flags = arguments
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        job = load_job(Path(folder))
        if job.threads:
            torch.set_num_threads(job.threads)
        cell = job.cell(name)
        if "--test" in flags:
            deploy_on_test(job, cell)
        else:
            run_cell(job, cell, Console(stderr=True))
    except AtsnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _end_with_input() -> None:
    """A sweep holds the other end of this pipe: when it is gone, so are its cells."""
    while os.read(0, 4096):  # not sys.stdin: its lock would abort the interpreter at its end
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
