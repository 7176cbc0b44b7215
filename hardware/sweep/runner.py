"""Run the cells of a sweep that are not done, side by side, on one machine or on a cluster.

Each cell is a process of its own: what kills one leaves the others alone and becomes a row with
the error's text. A cell that was interrupted goes on where its training stood; the table of a sweep
that was killed and run again is the table of one that was not, apart from the seconds.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atsnn.errors import ConfigError
from atsnn.training import CONFIG_FILE
from hardware.sweep.cell import RESULT_FILE, SWEEP_FILE, TEST_FILE, Job
from hardware.sweep.config import Cell, cell_id, cells_of
from hardware.sweep.files import read_json, write_file, write_json
from hardware.sweep.start import watched_by_start

TABLE_FILE, TEST_TABLE_FILE = "table.csv", "test.csv"
FIRST_COLUMNS = ("method", "group", "family", "budget", "seed", "status", "error")
HIDDEN = frozenset({"fingerprint"})
TIMES = frozenset({"seconds"})
"""Columns that differ between two runs of the same sweep."""
Row = dict[str, Any]
Report = Callable[[str, Row], None]


def run_sweep(
    job: Job,
    workers: int = 1,
    cluster: str | None = None,
    retry: bool = False,
    report: Report | None = None,
) -> Path:
    """Run what is left of a sweep and write its table; returns the table's path.

    Args:
        workers: cells at a time on this machine.
        cluster: address of a Dask scheduler whose workers share the sweep's folder.
        retry: run cells again that failed before.
        report: called with the id and the row of each cell that ends.

    Raises:
        ConfigError: the folder holds another sweep, or the cluster cannot be used.
    """
    cells = cells_of(job.sweep)
    _check_folder(job, cells)
    job.save()
    write_table(job)  # rows of an older grid in this folder go
    with _pool(workers, cluster) as pool:
        for wave in _waves(cells):
            _run_wave(job, pool, [c for c in wave if _is_due(job, c, retry)], report)
    return write_table(job)


def deploy_on_test(job: Job, names: Iterable[str], report: Report | None = None) -> Path:
    """Deploy finished cells on the test images, one after another; returns the test table's path.

    A cell that fails has no row in the table and can be tried again; `report` hears of it.

    Raises:
        ConfigError: a cell that is not there, not finished, or was tested before; nothing was run.
    """
    chosen = [job.cell(name) for name in names]
    for cell in chosen:
        if _result(job, cell).get("status") != "done":
            raise ConfigError(f"{cell.id}: not finished; run the sweep first")
        if (job.place(cell) / TEST_FILE).exists():
            raise ConfigError(
                f"{cell.id}: its test result is there already ({TEST_TABLE_FILE}); test images are "
                "used once"
            )
    for cell in chosen:
        error = _call(job.folder, cell.id, "--test")
        row = read_json(job.place(cell) / TEST_FILE) or {"status": "failed", "error": error}
        if report:
            report(cell.id, row)
    return write_table(job, TEST_FILE, TEST_TABLE_FILE)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table, in order; empty if there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def row_id(row: dict[str, str]) -> str:
    """Id of a row's cell."""
    return cell_id(row["method"], row["budget"], int(row["seed"]))


def write_table(job: Job, source: str = RESULT_FILE, name: str = TABLE_FILE) -> Path:
    """Write one row per cell that has ended, in the order of the grid."""
    groups = {method.name: method for method in job.sweep.methods}
    rows = []
    for cell in cells_of(job.sweep):
        result = read_json(job.place(cell) / source)
        if result is None:
            continue
        method = groups[cell.method]
        rows.append(
            {
                "method": cell.method,
                "group": method.group,
                "family": method.family,
                "budget": cell.budget,
                "seed": cell.seed,
                "status": "done",
                "error": "",
                **{key: value for key, value in result.items() if key not in HIDDEN},
            }
        )
    path = job.folder / name
    write_file(path, _csv(rows).encode())
    return path


def _csv(rows: list[Row]) -> str:
    columns = list(dict.fromkeys([*FIRST_COLUMNS, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check_folder(job: Job, cells: list[Cell]) -> None:
    if (job.folder / CONFIG_FILE).exists() and not (job.folder / SWEEP_FILE).exists():
        raise ConfigError(f"{job.folder}: holds a run of `atsnn train`; choose another folder")
    if not job.start.is_file():
        raise ConfigError(f"{job.start}: no such checkpoint to start from (--start)")
    held, wanted = watched_by_start(job.start), max(c.run.data.validation_images for c in cells)
    if held is not None and held < wanted:
        raise ConfigError(
            f"{job.start}: was trained with {held:,} images held out, this sweep measures on "
            f"{wanted:,}, some of which it has seen; train the start with data.validation_images "
            f"{wanted}, or lower it here"
        )
    for cell in cells:
        result = _result(job, cell)
        if result.get("status") == "done" and result.get("fingerprint") != job.fingerprint(cell):
            raise ConfigError(
                f"{job.place(cell)}: was made with another configuration or checkpoint; choose "
                "another folder, or remove that one"
            )


def _is_due(job: Job, cell: Cell, retry: bool) -> bool:
    status = _result(job, cell).get("status")
    return status is None or (retry and status == "failed")


def _result(job: Job, cell: Cell) -> Row:
    return read_json(job.place(cell) / RESULT_FILE) or {}


def _waves(cells: list[Cell]) -> list[list[Cell]]:
    """Trained cells, then those that take their weights."""
    return [
        [cell for cell in cells if cell.source is None],
        [cell for cell in cells if cell.source is not None],
    ]


def _run_wave(job: Job, pool: Executor, cells: list[Cell], report: Report | None) -> None:
    waiting: dict[Future[str], Cell] = {}
    for cell in cells:
        broken = _broken_source(job, cell)
        if broken:
            _end(job, cell, broken, report)
        else:
            waiting[pool.submit(_call, job.folder, cell.id)] = cell
    for future in as_completed(waiting):
        cell = waiting[future]
        _end(job, cell, _outcome(future), report)


def _outcome(future: Future[str]) -> str:
    """Error text of a cell, "" if it went well; also what the pool itself brings up."""
    try:
        return future.result()
    except Exception as error:  # whatever a cluster raises for a lost worker
        return f"{type(error).__name__}: {error}"


def _broken_source(job: Job, cell: Cell) -> str:
    if cell.source is None:
        return ""
    source = read_json(job.place(cell.source) / RESULT_FILE) or {}
    if source.get("status") == "done":
        return ""
    return f"its source {cell.source} failed; mend that one and run the sweep with --retry"


def _end(job: Job, cell: Cell, error: str, report: Report | None) -> None:
    path = job.place(cell) / RESULT_FILE
    result = read_json(path)
    if error or result is None:
        result = {"status": "failed", "error": error or "ended without a result"}
        write_json(path, result)
    write_table(job)
    if report:
        report(cell.id, result)


def _call(folder: Path, name: str, *flags: str) -> str:
    """Run one cell in an interpreter of its own; returns the error text, "" if it went well."""
    command = [sys.executable, "-m", "hardware.sweep.cell", str(folder), name, *flags]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with _RUNNING.keeping(process):
        assert process.stderr is not None  # it is a pipe
        lines = [line.strip() for line in process.stderr if line.strip()]
        code = process.wait()
    if code == 0:
        return ""
    if code < 0:
        return f"killed by signal {-code}"
    return (lines or [f"exit status {code}"])[-1].removeprefix("error: ")


class _Running:
    """The cells of this process that are running, so that none is left when it stops."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    @contextmanager
    def keeping(self, process: subprocess.Popen[str]) -> Iterator[None]:
        with self._lock:
            self._processes.add(process)
        try:
            yield
        finally:
            with self._lock:
                self._processes.discard(process)
            process.kill()
            for stream in (process.stdin, process.stderr):
                if stream is not None:
                    stream.close()

    def stop(self) -> None:
        with self._lock:
            for process in self._processes:
                process.kill()


_RUNNING = _Running()


@contextmanager
def _pool(workers: int, cluster: str | None) -> Iterator[Executor]:
    """Threads that wait for processes here, or a cluster's workers; both are `Executor`s."""
    if cluster is None:
        pool: Executor = ThreadPoolExecutor(workers)
        close: Callable[[], None] = lambda: None  # noqa: E731 (nothing to close)
    else:
        pool, close = _cluster_pool(cluster)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _RUNNING.stop()
        raise
    finally:
        close()


def _cluster_pool(address: str) -> tuple[Executor, Callable[[], None]]:
    try:
        from dask.distributed import Client
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a cluster was asked for ({address}), but Dask does not import here ({error}); "
            "install atsnn[cluster], or leave --cluster out to run on this machine"
        ) from None
    try:
        client = Client(address, timeout=30)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cluster {address}: cannot be reached ({error})") from None
    return client.get_executor(), lambda: _closed(client.close)


def _closed(close: Callable[[], object]) -> None:
    close()
