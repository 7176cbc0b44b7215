"""What goes wrong inside Lava arrives as one line within seconds and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from export.errors import LavaRunError, LavaUnavailableError, UnsupportedTargetError
from export.lava import compat, watch
from export.lava.session import members, shared_memory
from export.lava.watch import WORK, job_folder, run_watched

FAILING = Path(__file__).parent / "lava_models" / "failing.py"
SECONDS_TO_NOTICE = 10
SECONDS_TO_START = 100


@dataclass
class Left:
    """What a watched run had while it was ended, and what is left of it."""

    folders: Path
    sessions: list[int] = field(default_factory=list)
    segments: set[Path] = field(default_factory=set)

    @property
    def stamp(self) -> Path:
        """The file in which a fault notes its time."""
        return self.folders.with_name("stamp")

    def anything(self) -> list[str]:
        processes = [
            f"process {m.pid}" for s in self.sessions for m in members(s).values() if not m.ended
        ]
        segments = [str(segment) for segment in self.segments if segment.exists()]
        return processes + segments + [str(folder) for folder in self.folders.iterdir()]


@pytest.fixture
def left(tmp_path, monkeypatch):
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    monkeypatch.setenv("TMPDIR", str(folders))
    result = Left(folders)
    end_session = watch.end_session

    def noted(session):
        result.sessions.append(session)
        result.segments |= shared_memory(session)
        end_session(session)

    monkeypatch.setattr(watch, "end_session", noted)
    return result


def run(name, left, *, fault=None, **options):
    arguments = {"stamp": str(left.stamp), **({} if fault is None else {"fault": fault})}
    with job_folder() as folder:
        run_watched(f"{FAILING}:{name}", arguments, folder, **options)
        return {path.name: np.load(path) for path in (folder / WORK).iterdir()}


def failure(name, left, *, error=LavaRunError, **options) -> str:
    with pytest.raises(error) as caught:
        run(name, left, **options)
    noticed = time.time()
    if left.stamp.exists():
        assert noticed - float(left.stamp.read_text()) < SECONDS_TO_NOTICE
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.lava
class TestNetworkThatFails:
    def test_sound_network_returns_its_results(self, left):
        assert run("run_network", left, fault="none")["voltage.npy"].shape == (4,)
        assert left.anything() == []

    def test_model_that_raises_is_named_with_its_own_message(self, left):
        message = failure("run_network", left, fault="raise")
        assert message == (
            "process middle (PyFaultModel) failed: ValueError: table index 7 is out of range 0 to 6"
        )
        assert left.segments
        assert left.anything() == []

    def test_model_that_cannot_be_built_is_named(self, left):
        message = failure("run_network", left, fault="init")
        assert message == "process middle (PyFaultModel) failed: ValueError: no such table"
        assert left.segments
        assert left.anything() == []

    def test_message_of_the_wrong_shape_is_named(self, left):
        message = failure("run_network", left, fault="shape")
        assert message.startswith("process middle (PyFaultModel) failed: AssertionError: ")
        assert left.anything() == []

    def test_killed_model_process_is_named(self, left):
        message = failure("run_network", left, fault="kill")
        assert message.startswith("process middle (PyFaultModel) (pid ")
        assert message.endswith(") was killed by SIGKILL")
        assert left.segments
        assert left.anything() == []

    def test_model_that_hangs_runs_into_the_time_limit(self, left):
        message = failure("run_network", left, fault="hang", timeout=5)
        assert message.startswith("not finished after 5 s")
        assert left.anything() == []

    def test_next_network_runs_after_a_failure_that_brings_its_traceback(self, left):
        with pytest.raises(LavaRunError) as caught:
            run("run_network", left, fault="raise")
        assert "in run_spk" in str(caught.value.__cause__)
        assert run("run_network", left, fault="none")


@pytest.mark.lava
class TestInterpreterThatFails:
    def test_killed_interpreter(self, left):
        assert failure("die", left) == "the Lava interpreter was killed by SIGKILL"
        assert left.anything() == []

    def test_error_of_this_project_arrives_as_it_is(self, left):
        assert failure("refuse", left, error=UnsupportedTargetError) == "gate b1 looks back"
        assert left.anything() == []

    def test_time_limit(self, left):
        assert failure("hang", left, timeout=0.5).startswith("not finished after 0.5 s")
        assert left.anything() == []

    def test_stall_names_the_last_time_step(self, left):
        with job_folder() as folder, pytest.raises(LavaRunError, match="no progress for 1 s at ti"):
            run_watched(
                f"{FAILING}:note_progress",
                {},
                folder,
                stall=1,
                progress_file=folder / WORK / "progress",
            )
        assert left.anything() == []

    def test_error_in_the_progress_callback_ends_the_run(self, left):
        def stop(step):
            raise KeyboardInterrupt

        with job_folder() as folder, pytest.raises(KeyboardInterrupt):
            run_watched(
                f"{FAILING}:note_progress",
                {},
                folder,
                progress_file=folder / WORK / "progress",
                on_progress=stop,
            )
        assert left.anything() == []

    def test_missing_function(self, left):
        message = failure("no_such_function", left)
        assert "no_such_function" in message
        assert left.anything() == []


PARENT = """
from export.lava.watch import job_folder, run_watched
with job_folder() as folder:
    print(folder, flush=True)
    run_watched({target!r}, {{"stamp": {stamp!r}, "fault": "hang"}}, folder)
"""


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.lava
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_parent_is_killed_nothing_stays(number, tmp_path):
    stamp, temporary = tmp_path / "stamp", tmp_path / "temporary"
    temporary.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(target=f"{FAILING}:run_network", stamp=str(stamp))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert parent.stdout is not None
    folder = Path(parent.stdout.readline().strip())
    wait_until(stamp.exists, SECONDS_TO_START)
    actor = int(next((folder / watch.ACTORS).glob("*[0-9]")).name)
    session = os.getsid(actor)
    segments = shared_memory(session)
    assert segments

    parent.send_signal(number)
    parent.communicate()

    def all_ended():
        return all(member.ended for member in members(session).values())

    wait_until(all_ended, SECONDS_TO_NOTICE)
    assert not any(segment.exists() for segment in segments)
    assert list(temporary.iterdir()) == []


class TestLavaThatIsMissing:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lava", None)
        monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
        with pytest.raises(LavaUnavailableError) as caught:
            compat.check_lava()
        assert str(caught.value).startswith("Lava is not installed for Python 3.11 (lava")
        assert "make PYTHON=python3.10" in str(caught.value)

    def test_way_to_get_it_on_its_own_python(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lava", None)
        monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
        with pytest.raises(LavaUnavailableError, match=r"pip install 'atsnn\[lava\]'"):
            compat.check_lava()

    def test_wrong_python(self, monkeypatch):
        monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
        with pytest.raises(LavaUnavailableError) as caught:
            compat.check_lava()
        assert str(caught.value) == (
            "Lava does not run on Python 3.13, only on 3.10, 3.11 and 3.12: "
            "make PYTHON=python3.10 installs the project with Lava"
        )

    @pytest.mark.lava
    def test_broken_installation_is_told_from_the_child(self, left, tmp_path, monkeypatch):
        broken = tmp_path / "broken" / "lava"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("raise ImportError('a wheel for another machine')\n")
        monkeypatch.setenv("PYTHONPATH", str(broken.parent))
        message = failure("hang", left, error=LavaUnavailableError)
        assert "does not import (a wheel for another machine)" in message
        assert left.anything() == []

    def test_package_imports_without_lava(self):
        program = "import export.lava, export.lava.run, sys; sys.exit('lava.magma' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.lava
def test_lava_loads_after_others_asked_for_the_start_method() -> None:
    code = (
        "import multiprocessing; multiprocessing.get_start_method()\n"
        "from export.lava.compat import require_lava; require_lava()\n"
        "import lava.magma.core.process.process\n"
        "print(multiprocessing.get_start_method())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "fork"
