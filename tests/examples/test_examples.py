"""Every example runs as a user would run it, on little data, and prints what its head promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_quickstart() -> None:
    out = run_example("quickstart.py", "--images", "16")
    assert "accuracy on 16 images" in out
    assert "none: equal" in out


def test_energy_vs_gpu() -> None:
    out = run_example("energy_vs_gpu.py", "--images", "8", "--gpu", "modelled")
    assert out.startswith("Assumptions")
    assert "Energy per image" in out


@pytest.mark.lava
def test_own_network_fires_the_same_spikes_in_lava() -> None:
    out = run_example("own_network.py", "--epochs", "1", "--images", "4")
    assert out.count("none: equal") == 3


def test_train_and_deploy_digits(tmp_path: Path) -> None:
    out = run_example(
        "train_and_deploy_digits.py", "--out", str(tmp_path / "run"), "--epochs", "1",
        "--images", "4",
    )  # fmt: skip
    assert (tmp_path / "run" / "graph.h5").is_file()
    assert "none: equal" in out
