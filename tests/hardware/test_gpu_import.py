"""GPU measurements made elsewhere: provenance or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_networks import Adaptive, images_for

from hardware.errors import GpuMeasurementError
from hardware.gpu import PowerTrace, Window, evaluate
from hardware.gpu_import import Provenance, imported_rows, load_measurements, save_measurements
from hardware.placement.table import placed_table

PROVENANCE = {
    "measured_by": "A. Person",
    "date": "2026-01-31",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "550.54",
    "command": "python examples/energy_vs_gpu.py --gpu measured",
    "network": "the built-in model",
}
ENTRY: dict[str, Any] = {
    "batch": 256,
    "windows": 5,
    "window_seconds": 4.0,
    "total_joules_per_image": 0.01,
    "dynamic_joules_per_image": 0.006,
    "idle_watts": 80.0,
    "images_per_second": 20_000.0,
    "spread": 0.01,
    "source": "energy counter",
    "provenance": PROVENANCE,
}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    return path


def test_a_whole_one_becomes_a_row_that_names_who_measured(tmp_path: Path) -> None:
    found = load_measurements(written(tmp_path, [ENTRY, {**ENTRY, "batch": 1}]))
    rows = imported_rows(found, 1e9)
    assert [row.system[-9:] for row in rows] == ["batch 256", ", batch 1"]
    assert rows[0].grade == "measured"
    assert "measured elsewhere" in rows[0].convention
    assert "A. Person on 2026-01-31" in rows[0].note
    assert rows[0].joules_low < rows[0].joules_per_image < rows[0].joules_high


def test_a_measurement_is_written_and_read_back(tmp_path: Path) -> None:
    moments = np.arange(0, 300) * 0.1
    millijoules = 1e3 * (50 * moments + 100 * np.maximum(moments - 10, 0))
    trace = PowerTrace("board", moments, millijoules, 0 * moments)
    measured = evaluate(trace, Window(1, 9), [Window(11, 19, 800), Window(20, 28, 800)])
    path = tmp_path / "out.json"
    save_measurements(path, {32: measured, 1: measured}, Provenance(**PROVENANCE))
    back, single = load_measurements(path)
    assert single.batch == 1
    assert back.total_joules_per_image == pytest.approx(150 / 100)
    assert back.dynamic_joules_per_image == pytest.approx(100 / 100)
    assert back.idle_watts == pytest.approx(50)
    assert (back.batch, back.windows) == (32, 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"provenance": None}, "no provenance; a number that nobody can trace"),
        ({"provenance": {}}, "add provenance with measured_by, date, device"),
        ({"provenance": {**PROVENANCE, "driver": ""}}, r"provenance\.driver: String should have"),
        ({"provenance": {**PROVENANCE, "date": "last week"}}, r"provenance\.date: String should"),
        ({"batch": 0}, "batch: Input should be greater than or equal to 1"),
        ({"total_joules_per_image": float("nan")}, "total_joules_per_image: Input should be"),
        ({"dynamic_joules_per_image": 0.001}, "total less idle power over rate is 0.006"),
        ({"watts": 3}, "watts: Extra inputs"),
    ],
)
def test_what_is_missing_or_does_not_add_up_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(GpuMeasurementError, match=problem):
        load_measurements(written(tmp_path, {**ENTRY, **change}))


@pytest.mark.parametrize("content", [[], "x", [1]])
def test_what_is_no_measurement(tmp_path: Path, content: object) -> None:
    with pytest.raises(GpuMeasurementError, match=r"gpu\.json"):
        load_measurements(written(tmp_path, content))


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(GpuMeasurementError, match="cannot be read"):
            load_measurements(path)
    with pytest.raises(GpuMeasurementError, match="cannot be read"):
        load_measurements(tmp_path / "absent.json")


def test_it_stands_in_the_comparison_beside_the_model(tmp_path: Path) -> None:
    graph = Adaptive(gates=False).build()
    measured = load_measurements(written(tmp_path, ENTRY))
    table = placed_table(graph, images_for(graph, 2), gpu="modelled", imported=measured)
    assert table.rivals[-1].grade == "measured"


def test_auto_without_a_gpu_says_so_in_one_line_and_models() -> None:
    from hardware.gpu import gpu_problem

    if gpu_problem() is None:
        pytest.skip("there is a GPU here")
    graph = Adaptive(gates=False).build()
    table = placed_table(graph, images_for(graph, 2), gpu="auto")
    assert table.gpu_line.startswith("modelled: no GPU measured: ")
    assert "\n" not in table.gpu_line
    gpu = [row for row in table.rivals if "on a GPU" in row.system]
    assert gpu
    assert all("modelled" in row.convention for row in gpu)
