"""Lava's own tests, which its wheel installs, pass with its networks in one interpreter.

What cannot apply, and why, is listed in `lava_in_process_plugin.py`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = {
    "magma/runtime": 40,
    "magma/core/process": 60,
    "magma/core/model": 20,
    "magma/core/learning": 90,
    "magma/compiler": 60,
    "proc/atrlif proc/bit_check proc/conv proc/conv_in_time proc/dense proc/graded": 90,
    "proc/io proc/lif proc/monitor proc/prodneuron proc/resfire proc/rf proc/rf_iz": 70,
    "proc/s4d proc/sdn proc/sparse proc/spiker networks": 60,
}

pytestmark = [pytest.mark.lava, pytest.mark.slow, pytest.mark.timeout(900)]


def shipped() -> Path:
    spec = importlib.util.find_spec("lava")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).parent / "tests" / "lava"


@pytest.mark.parametrize("folders", FOLDERS)
def test_pass_in_process(folders, tmp_path):
    """The number is the least that must pass; the rest of the folder is skipped with a reason."""
    tests = shipped()
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    command += ["-p", "lava_in_process_plugin", "--timeout", "120", f"--rootdir={tests.parents[1]}"]
    command += [str(tests / folder) for folder in folders.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= FOLDERS[folders]
