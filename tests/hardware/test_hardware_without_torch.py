"""A saved graph runs and is priced on a machine without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "norse", "lava"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
import hardware
from hardware.errors import VerificationError
from hardware.profile import load_profile
from hardware.report import energy_rich_table
from tiny_networks import Adaptive, images_for

graph = Adaptive(merge=1).build()
images = images_for(graph, 2)
result = hardware.run(graph, images)
table = hardware.energy_table(graph, images)
energy_rich_table(table)
own = hardware.Stage("own", lambda images: hardware.run(graph, images).trace)
from hardware.verify import verify
assert verify(graph, images, [own]).equal
try:
    verify(graph, images, ["engine"])
except VerificationError as error:
    assert "needs torch" in str(error), error
else:
    raise AssertionError("verified against a torch that is not there")
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
print("done", len(table.rows))
"""


def test_the_whole_package_runs_without_torch() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r})\n{SCRIPT}"],
        capture_output=True, text=True, timeout=120, cwd=here.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done ")


def test_public_names_are_imported_on_first_use() -> None:
    script = """
import sys, hardware
assert "numpy" not in sys.modules
assert set(dir(hardware)) >= set(hardware.__all__)
for name in hardware.__all__:
    getattr(hardware, name)
try:
    hardware.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'hardware' has no attribute 'nothing'\n"
