"""Run a function in a watched child interpreter, so that Lava can neither hang nor litter.

Lava puts every process model into an OS process of its own. When one raises or dies, its runtime
waits for ever and leaves processes and shared memory behind. So the function runs in a child
interpreter with a session of its own. Every process in it notes who it is and what it raises in the
job's folder; the parent watches that folder and `/proc`, and afterwards removes all that is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import atsnn.errors
import export.errors
from atsnn.errors import AtsnnError
from export.errors import LavaRunError
from export.lava.session import end_session, members

POLL = 0.05
LOOK = 0.5
"""Seconds between two looks at all processes of a run; there may be hundreds."""
STALL = 300.0
"""Seconds without progress; a large network on a busy machine takes a while to start."""
TIMEOUT = 1800.0

Progress = Callable[[int], None]

# File names in a job's folder. The child writes them; each appears whole or not at all.
JOB, FAILURES, ACTORS, FINISHED, LOG = "job.json", "failures", "actors", "finished", "log"
WORK, TEMPORARY = "work", "tmp"


@contextmanager
def job_folder() -> Iterator[Path]:
    """A new folder for one job, removed at the end whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="atsnn-lava-"))
    try:
        for name in (FAILURES, ACTORS, WORK, TEMPORARY):
            (folder / name).mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_watched(
    target: str,
    arguments: Mapping[str, Any],
    folder: Path,
    *,
    timeout: float = TIMEOUT,
    stall: float = STALL,
    progress_file: Path | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Call `function(work_folder, **arguments)` in a watched child interpreter with Lava imported.

    The function gets its input from and leaves its results in `folder / "work"`.

    Args:
        target: `package.module:function` or `/path/file.py:function`.
        arguments: keyword arguments; they travel as JSON.
        folder: from `job_folder()`.
        timeout: seconds after which the child is ended.
        stall: seconds without progress after which it is ended.
        progress_file: a file whose text, a whole number, rises while the function advances.
        on_progress: called with that number.

    Raises:
        LavaUnavailableError: Lava does not import in the child.
        LavaRunError: a process raised, died or stalled; names it. Anything else of this project's
            errors that the function raises arrives as it is.
    """
    description = {"target": target, "arguments": dict(arguments), "parent": os.getpid()}
    (folder / JOB).write_text(json.dumps(description))
    with (folder / LOG).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "export.lava._child", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            cwd=folder / WORK,
            start_new_session=True,
        )
    try:
        _Watch(child, folder, timeout, stall, progress_file, on_progress).until_finished()
    finally:
        end_session(child.pid)
        child.wait()


def _environment(folder: Path) -> dict[str, str]:
    root = str(Path(export.errors.__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(threads, "1"),
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder / TEMPORARY),
    }


@dataclass
class _Watch:
    child: subprocess.Popen[bytes]
    folder: Path
    timeout: float
    stall: float
    progress_file: Path | None
    on_progress: Progress | None
    started: float = field(default_factory=time.monotonic)
    advanced: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    progress: int = 0

    def until_finished(self) -> None:
        while not (self.folder / FINISHED).exists():
            self._check_failures()
            self._check_processes()
            self._check_progress()
            time.sleep(POLL)

    def _check_failures(self) -> None:
        if self._failures():
            time.sleep(2 * POLL)
            raise _as_error(self._failures()[0])

    def _failures(self) -> list[dict[str, str]]:
        """What processes have raised; those whose name is known first, then the earliest."""
        files = sorted((self.folder / FAILURES).glob("*.json"), key=lambda f: f.stat().st_mtime)
        return sorted((json.loads(f.read_text()) for f in files), key=lambda f: not f["process"])

    def _check_processes(self) -> None:
        if self.child.poll() is None:
            if time.monotonic() - self.looked < LOOK:
                return
            self.looked = time.monotonic()
            if not self._ended_actors():
                return
        time.sleep(2 * POLL)
        self._check_failures()
        code, ended = self.child.poll(), self._ended_actors()
        if (self.folder / FINISHED).exists() or (code is None and not ended):
            return
        if code is None:
            raise LavaRunError(ended[0])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise LavaRunError(f"the Lava interpreter {how}{self._last_words()}")

    def _ended_actors(self) -> list[str]:
        """Processes that have ended without having said so; they remove their note when they do."""
        notes = [note for note in (self.folder / ACTORS).iterdir() if note.name.isdigit()]
        there = members(self.child.pid)
        ended = []
        for note in notes:
            member = there.get(int(note.name))
            if member is None or member.ended:
                ending = member.ending if member is not None else "has vanished"
                with suppress(FileNotFoundError):
                    ended.append(f"process {note.read_text()} (pid {note.name}) {ending}")
        return ended

    def _check_progress(self) -> None:
        now = time.monotonic()
        if self.progress_file is not None and self.progress_file.exists():
            text = self.progress_file.read_text().strip()
            if text.isdigit() and int(text) > self.progress:
                self.progress, self.advanced = int(text), now
                if self.on_progress is not None:
                    self.on_progress(self.progress)
        where = f" at time step {self.progress}" if self.progress_file is not None else ""
        if now - self.started > self.timeout:
            raise LavaRunError(f"not finished after {self.timeout:g} s{where}{self._last_words()}")
        if self.progress_file is not None and now - self.advanced > self.stall:
            raise LavaRunError(f"no progress for {self.stall:g} s{where}{self._last_words()}")

    def _last_words(self) -> str:
        lines = (self.folder / LOG).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last words: {last}" if last else ""


class RemoteTracebackError(Exception):
    """Carries the traceback of another interpreter as the cause of an error."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def _as_error(failure: dict[str, str]) -> AtsnnError:
    kind, message = failure["type"], " ".join(failure["message"].split())
    known = getattr(export.errors, kind, None) or getattr(atsnn.errors, kind, None)
    if known is not None and not failure["process"]:
        error = known(message)
    else:
        place = f"process {failure['process']}" if failure["process"] else "the Lava run"
        error = LavaRunError(f"{place} failed: {kind}: {message}")
    error.__cause__ = RemoteTracebackError(failure["traceback"])
    return error
