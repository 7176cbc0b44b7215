"""The command line: what it prints, and one line and an exit status for what goes wrong."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from tiny_runs import TINY, write_idx

from atsnn import cli
from atsnn.checkpoint import save_checkpoint
from atsnn.config import merged
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `atsnn ...` in this process: exit status, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atsnn", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def data(tmp_path):
    write_idx(tmp_path / "data", train=24, test=9)
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(TINY, {"train": {"epochs": 1}})))
    return path


def test_train_eval_and_resume(command, data, config, tmp_path):
    out = tmp_path / "run"
    status, printed, shown = command("train", "--config", config, "--data", data, "--out", out)
    assert status == 0
    assert printed == ""
    assert "24 training and 9 test images" in shown
    assert "epoch 1/1" in shown
    with (out / "log.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 1
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["train"]["weight_decay"] == 0.06

    status, printed, _ = command("eval", out, "--data", data, "--json")
    result = json.loads(printed)
    assert status == 0
    assert result["images"] == 9
    assert {"accuracy", "accuracy_float", "average_tokens"} <= result.keys()

    assert command("train", "--resume", "--data", data, "--out", out)[0] == 0
    status, _, shown = command("train", "--config", config, "--data", data, "--out", out)
    assert status == 1
    assert shown.endswith("go on with --resume, or choose another folder\n")


def test_eval_of_a_quantised_model_prints_both_accuracies_and_their_agreement(
    command, data, tmp_path
):
    from tiny_runs import tiny_config

    model_config = tiny_config().model
    path = save_checkpoint(
        tmp_path / "q.safetensors", quantize_model(Spikformer(model_config).eval()), model_config
    )
    status, printed, _ = command("eval", path, "--data", data)
    assert status == 0
    for part in ("accuracy float", "average tokens", "tokens per block and step", "agreement"):
        assert part in printed
    _, printed, _ = command("eval", path, "--data", data, "--json", "--images", 4)
    result = json.loads(printed)
    assert result["quantized"]
    assert result["images"] == sum(map(sum, result["agreement"])) == 4
    assert len(result["tokens_per_block_and_step"][0]) == model_config.steps
    assert result["model"] == str(path)


def test_epochs_apply_to_every_stage(command, data, tmp_path):
    stages = [{"name": "a", "train": {"epochs": 9}}, {"name": "b"}]
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump({**TINY, "stages": stages}))
    out = tmp_path / "run"
    arguments = ("--config", path, "--data", data, "--out", out, "--epochs", 1, "--json")
    status, printed, _ = command("train", *arguments)
    assert status == 0
    assert json.loads(printed)["model"] == str(out / "model.safetensors")
    for stage in "ab":
        assert len((out / stage / "log.csv").read_text().splitlines()) == 2


def test_presets_and_data(command, data):
    status, printed, _ = command("presets", "--json")
    assert status == 0
    assert "digits" in json.loads(printed)
    status, printed, _ = command("data", data)
    assert status == 0
    assert "train_images  24" in printed
    assert json.loads(command("data", "digits", "--json")[1])["test_images"] == 359


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "nowhere"], "nowhere: no such data folder"),
        (["eval", "nowhere.safetensors", "--data", "digits"], "nowhere.safetensors: no such"),
        (["train", "--preset", "none", "--out", "x"], "no preset 'none'; there are: "),
        (["train", "--config", "none.yaml", "--out", "x"], "none.yaml: no such configuration"),
        (["train", "--resume", "--out", "nowhere"], "nowhere: no run to resume there"),
        (["train", "--preset", "demo-fashion", "--out", "x"], "no data folder given"),
        (
            ["train", "--preset", "digits", "--out", "x", "--set", "train.lrr=1"],
            "preset digits: unknown key train.lrr; known here: accumulate, batch,",
        ),
        (["train", "--preset", "digits", "--out", "x", "--set", "lr"], "write key=value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_ends_in_one_line_and_status_1(
    command, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, printed, shown = command(*arguments)
    assert status == 1
    assert printed == ""
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--out", "x"],
        ["train", "--preset", "digits"],
        ["train", "--preset", "digits", "--config", "c.yaml", "--out", "x"],
        ["train", "--preset", "digits", "--out", "x", "--epochs", "0"],
        ["fly"],
        ["eval", "--nothing"],
    ],
)
def test_wrong_usage_is_status_2_without_a_traceback(command, arguments):
    status, _, shown = command(*arguments)
    assert status == 2
    assert "Error: " in shown
    assert "Traceback" not in shown


def test_a_model_of_ones_own_needs_data(command, tmp_path):
    from tiny_runs import tiny_config

    model_config = tiny_config().model
    path = save_checkpoint(tmp_path, Spikformer(model_config), model_config)
    status, _, shown = command("eval", path)
    assert status == 2
    assert "--data DIR is needed with a model of your own" in shown


def test_images_of_the_wrong_size_are_refused(command, tmp_path):
    from tiny_runs import tiny_config

    model_config = tiny_config().model
    path = save_checkpoint(tmp_path, Spikformer(model_config), model_config)
    write_idx(tmp_path / "large", size=12)
    status, _, shown = command("eval", path, "--data", tmp_path / "large")
    assert status == 1
    assert "images are 12 x 12; the model takes 8 x 8 (data.resize: true, or" in shown
    assert command("eval", path, "--data", tmp_path / "large", "--resize")[0] == 0


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import atsnn.training
from atsnn import cli

original = atsnn.training.Run._step
def step(self, indices):
    os.kill(os.getpid(), signal.SIGINT)
    return original(self, indices)
atsnn.training.Run._step = step
cli.main()
"""


def test_control_c_ends_with_status_130_and_no_traceback(data, config, tmp_path):
    arguments = ["train", "--config", config, "--data", data, "--out", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode in (130, 128 + signal.SIGINT)
    assert "Traceback" not in done.stderr
