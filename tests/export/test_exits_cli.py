"""`atsnn-export exits`: margins beside the plain run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from spikformers import lively, small_config
from tiny_runs import idx_bytes
from typer.testing import CliRunner

from atsnn.checkpoint import save_checkpoint
from atsnn.quantization import quantize_model
from export.cli import app
from export.formats import hdf5
from export.spikformer import compile_spikformer

MARGINS = ("--margin", "0.5", "--margin", "1.5", "--images", "48")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Of the built-in model."""
    status, out, err = run("exits", *MARGINS, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["model"], found["images"]) == ("built-in model", 48)
    return found["rows"]


def test_the_first_row_is_the_run_without_an_exit(rows):
    whole = rows[0]
    assert whole["margin"] is None
    assert whole["mean_steps"] == 4
    assert whole["leaving"] == [0, 0, 0, 48]
    assert whole["sops_saved"] == 0
    status, out, _ = run("run", "--images", 48, "--json")
    assert status == 0
    plain = json.loads(out)
    assert whole["accuracy"] == plain["accuracy"]
    assert whole["average_tokens"] == pytest.approx(plain["average_tokens"])


def test_each_smaller_margin_leaves_earlier_and_costs_less(rows):
    assert [row["margin"] for row in rows] == [None, 1.5, 0.5]
    for later, earlier in pairwise(rows):
        assert sum(earlier["leaving"]) == 48
        for column in ("mean_steps", "average_tokens", "sops"):
            assert earlier[column] < later[column]
        assert earlier["sops_saved"] == pytest.approx(1 - earlier["sops"] / rows[0]["sops"])
        steps = sum(step * count for step, count in enumerate(earlier["leaving"], start=1))
        assert earlier["mean_steps"] == pytest.approx(steps / 48)


def test_people_read_a_table(rows):
    status, out, _ = run("exits", *MARGINS)
    assert status == 0
    assert "no exit" in out
    for row in rows:
        assert f"{row['accuracy']:.2%}" in out
        assert " ".join(str(count) for count in row["leaving"]) in out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph file, and a checkpoint whose merging looks at all steps."""
    folder = tmp_path_factory.mktemp("files")
    hdf5.save(compile_spikformer(quantize_model(lively(small_config()))), folder / "graph.h5")
    config = small_config(assignment="all")
    save_checkpoint(folder, quantize_model(lively(config)), config)
    return folder


@pytest.mark.parametrize(
    ("model", "options", "problem"),
    [
        (None, (), "no margin: give at least one --margin M, a difference of two logits"),
        (None, ("--margin", "0"), "--margin 0: give a number above 0, a difference of two logits"),
        (None, ("--margin", "nan"), "--margin nan: give a number above 0"),
        (None, ("--margin", "inf"), "--margin inf: give a number above 0"),
        (
            "graph.h5",
            ("--margin", "1"),
            "is a graph of 3 steps, whose read-out is rounded for them; exits need the checkpoint "
            "it came from",
        ),
        ("none.safetensors", ("--margin", "1"), "no such checkpoint"),
        (None, ("--margin", "1", "--data", "nowhere"), "nowhere: no such data folder"),
    ],
)
def test_bad_input_ends_in_one_line(files: Path, model, options, problem):
    status, out, err = run("exits", *([files / model] if model else []), *options)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert problem in err


def test_a_model_that_looks_ahead_is_refused_in_one_line(files: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (4, 12, 12)), rng.integers(0, 4, 4)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    status, out, err = run("exits", files, "--margin", "1", "--data", tmp_path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "merging.assignment all chooses pairs from all time steps" in err
