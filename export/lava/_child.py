"""Entry point of the child interpreter: `python -m export.lava._child FOLDER` (see `watch`)."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from export.lava.compat import require_lava
from export.lava.session import end_session
from export.lava.watch import ACTORS, FAILURES, FINISHED, JOB, TEMPORARY, WORK

_PR_SET_PDEATHSIG = 1


def main(folder: Path) -> int:
    job = json.loads((folder / JOB).read_text())
    _end_with_parent(folder, job["parent"])
    _keep_sockets_in(folder)
    try:
        require_lava()
        _note_actors(folder)
        _resolve(job["target"])(folder / WORK, **job["arguments"])
    except BaseException as error:
        _note_failure(folder, "", error)
        return 1
    (folder / FINISHED).touch()
    return 0


def _resolve(target: str) -> Callable[..., None]:
    place, _, name = target.rpartition(":")
    return getattr(_load(Path(place)) if place.endswith(".py") else _imported(place), name)


def _imported(name: str) -> ModuleType:
    return importlib.import_module(name)


def _load(path: Path) -> ModuleType:
    """Import a file under its stem; Lava looks process models up in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _end_with_parent(folder: Path, parent: int) -> None:
    """When the parent dies, take the whole session, its shared memory and its folder along."""
    child = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() == child:
            shutil.rmtree(folder, ignore_errors=True)
            end_session(child)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    _die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        leave(signal.SIGTERM, None)


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _keep_sockets_in(folder: Path) -> None:
    """Let multiprocessing put its sockets into the folder instead of one that outlives a kill.

    The path is relative, since a socket's path must be shorter than 108 characters.
    """
    process: Any = multiprocessing.current_process()
    process._config["tempdir"] = os.path.relpath(folder / TEMPORARY)


def _note_actors(folder: Path) -> None:
    """Let every OS process that Lava starts note its name, and what it raises, in the folder."""
    runtime: Any = importlib.import_module("lava.magma.runtime.runtime")
    original = runtime.target_fn

    def noted(*args: Any, **kwargs: Any) -> None:
        _die_with_parent(signal.SIGKILL)
        name = _actor_name(kwargs["builder"])
        note = folder / ACTORS / str(os.getpid())
        _write_whole(note, name)
        try:
            original(*args, **kwargs)
        except BaseException as error:
            _note_failure(folder, name, error)
            raise
        note.unlink()

    runtime.target_fn = noted


def _actor_name(builder: Any) -> str:
    model = getattr(builder, "proc_model", None)
    if model is None:
        return type(builder).__name__
    name = (builder.proc_params or {}).get("name") or model.implements_process.__name__
    return f"{name} ({model.__name__})"


def _note_failure(folder: Path, process: str, error: BaseException) -> None:
    failure = {
        "process": process,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": traceback.format_exc(),
    }
    _write_whole(folder / FAILURES / f"{os.getpid()}.json", json.dumps(failure))


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
