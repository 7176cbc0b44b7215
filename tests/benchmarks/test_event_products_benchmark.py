"""The benchmark of event-driven products: every layer, compared before it is timed."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from atsnn import event_products as products
from atsnn.config import ModelConfig
from benchmarks import event_products
from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import ClockName

TINY = ModelConfig(image_size=(16, 16), blocks=1, dim=32, heads=4, steps=3)


def test_every_layer_but_the_first_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(event_products.SHAPES, "tiny", (TINY, 2))
    result = CliRunner().invoke(event_products.app, ["tiny", "--turns", "1"])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ") for line in result.output.splitlines() if line.startswith("| ")]
    layers = [row[0].removeprefix("| ") for row in rows[2:]]
    stem = ["stem.conv2", "stem.conv3", "stem.conv4", "stem.position"]
    assert layers == stem + [f"blocks.0.{name}" for name in ("q", "k", "v", "proj", "fc1", "fc2")]
    assert all(len(row) == len(event_products.COLUMNS) for row in rows)


def test_events_with_other_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *inputs: right(*inputs) * 1.1)
    maps, weight = torch.ones(1, 4, 4, 8), torch.ones(8, 8, 3, 3)
    with pytest.raises(BenchmarkError, match="layer: products from events are not those of torch"):
        event_products.compare("layer", maps, weight, 1, ClockName.wall)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    result = CliRunner().invoke(event_products.app, ["9-99"])
    assert result.exit_code == 2
    assert "choose of 2-64, 2-96, 4-384" in result.output
