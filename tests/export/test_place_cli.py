"""`atsnn-export profiles | place | cores | break-even | measure-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from export.cli import app
from hardware.gpu import PowerTrace, Window, evaluate
from hardware.gpu_import import load_measurements

runner = CliRunner()


def run(*arguments: str) -> tuple[int, str, str]:
    result = runner.invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_profiles_are_listed_and_explained() -> None:
    code, out, _ = run("profiles")
    assert code == 0
    for name in ("loihi1", "loihi1_calibrated", "loihi2", "h100", "xeon-8380", "45nm-fp32"):
        assert name in out
    code, out, _ = run("profiles", "loihi1")
    assert code == 0
    assert "23.6 pJ" in out
    assert "simulated" in out
    code, out, _ = run("profiles", "loihi2", "--json")
    assert json.loads(out)["energy"]["synaptic_operation"]["grade"] == "assumed"


def test_a_preset_is_placed_without_a_checkpoint() -> None:
    code, out, _ = run("place", "--preset", "spikformer-2-384", "--profile", "loihi2",
                       "--strategy", "channel-major", "--json")  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["violations"] == []
    assert found["cores_lower_bound"] <= found["cores_used"] <= 1.3 * found["cores_lower_bound"]
    assert set(found) >= {
        "profile", "chips", "cores_used", "cores_lower_bound", "violations", "layers", "traffic",
    }  # fmt: skip
    assert found["traffic"]["hops"] < found["traffic"]["hops_in_order"]


def test_the_built_in_model_is_placed_with_tables_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "mesh.png"
    code, out, _ = run("place", "--profile", "loihi2", "--images", "2", "--cores",
                       "--picture", str(picture))  # fmt: skip
    assert code == 0
    assert "lower bound" in out
    assert "core-steps dark" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_energy_after_placement_as_json() -> None:
    code, out, _ = run("cores", "--images", "4", "--profile", "loihi2", "--gpu", "modelled",
                       "--json")  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["systems"][0]["system"] == "SNN, all tokens"
    assert {"Footprint", "ActivationSparsity"} <= set(found["neurobench"])
    assert set(found["systems"][0]["energy"]["causes"]) == {
        "synapse", "neuron", "message", "idle", "static",
    }  # fmt: skip


def test_break_even_is_printed_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "break_even.svg"
    code, out, _ = run("break-even", "--images", "4", "--profile", "loihi1_calibrated",
                       "--picture", str(picture))  # fmt: skip
    assert code == 0
    assert {"firing,", "surely"} <= set(out.split())
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("place", "--preset", "vit"), "no shape named 'vit'"),
        (("place", "--preset", "spikformer-4-384", "--data", "x"), "neither a MODEL nor --data"),
        (("place", "--profile", "a100", "--images", "0"), "'a100' has no cores to place on"),
        (("place", "--profile", "loihi7", "--images", "0"), "no profile named 'loihi7'"),
        (("place", "--images", "1", "--picture", "x.bmp"), "a picture ends in .png, .svg, .pdf"),
        (("profiles", "loihi7"), "no profile named 'loihi7'"),
        (("cores", "--gpu-file", "absent.json"), "absent.json: cannot be read"),
        (("measure-gpu", "--out", "gpu.json"), "needs a file and a name: give --out FILE and --by"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: tuple[str, ...], problem: str) -> None:
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1


def test_a_gpu_measurement_is_written_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The board draws 50 W at rest and 150 W at work, at 100 images a second."""
    moments = np.arange(0, 300) * 0.1
    millijoules = 1e3 * (50 * moments + 100 * np.maximum(moments - 10, 0))
    trace = PowerTrace("board", moments, millijoules, 0 * moments)
    measured = evaluate(trace, Window(1, 9), [Window(11, 19, 800), Window(20, 28, 800)])
    monkeypatch.setattr("hardware.gpu.measure_graph", lambda graph, images, batch: measured)
    monkeypatch.setattr("hardware.gpu.driver_version", lambda: "550.54")
    path = tmp_path / "gpu.json"
    code, out, _ = run(
        "measure-gpu", "--out", str(path), "--by", "A. Person", "--batch", "8", "--batch", "1"
    )
    assert code == 0
    assert "batch 8: 1.5 J per image in all, 1 J without idle power, 100 images/s" in out
    found = load_measurements(path)
    assert [entry.batch for entry in found] == [1, 8]
    assert found[0].provenance.command == "atsnn-export measure-gpu --batch 1 --batch 8"
    code, out, _ = run("measure-gpu", "--out", str(path), "--by", "A. Person", "--json")
    assert code == 0
    assert set(json.loads(out)["batches"]) == {"1", "64"}
