"""`atsnn-export` on a model of event recordings: every command takes them over time."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from event_recordings import encoded, write_listed
from torch import nn
from typer.testing import CliRunner

from atsnn.checkpoint import save_checkpoint
from atsnn.config import HaltingConfig, ModelConfig
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export import cli
from export.built_in import load_images, load_subject
from export.formats import hdf5
from hardware.engine import run

COUNT = 3
CONFIG = ModelConfig(
    in_channels=2,
    image_size=(34, 34),
    classes=10,
    steps=3,
    blocks=1,
    dim=16,
    heads=2,
    mlp_ratio=2,
    events=True,
    halting=HaltingConfig(enabled=True, gamma=3.0, beta=-1.2),
)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def recording(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    columns, rows, polarities = (
        rng.integers(0, 34, 900),
        rng.integers(0, 34, 900),
        rng.integers(0, 2, 900),
    )
    times = np.sort(rng.integers(0, 300_000, 900))
    return encoded(
        [
            (int(x), int(y), int(p), int(t))
            for x, y, p, t in zip(columns, rows, polarities, times, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = {f"{number}.bs2": recording(number) for number in range(1, COUNT + 2)}
    tested = "".join(f"{number} {number}\n" for number in range(2, COUNT + 2))
    return write_listed(tmp_path_factory.mktemp("data"), files, "1 1\n", tested)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Spikformer(CONFIG)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 2.5)
            nn.init.uniform_(module.bias, -0.5, 1.0)
    model((torch.rand(4, CONFIG.steps, 2, 34, 34) < 0.2).float())
    return save_checkpoint(tmp_path_factory.mktemp("run"), quantize_model(model.eval()), CONFIG)


@pytest.fixture(scope="module")
def graph_file(checkpoint: Path) -> Path:
    return hdf5.save(load_subject(checkpoint).graph, checkpoint.with_name("graph.h5"))


class TestRecordings:
    def test_are_cut_into_the_steps_of_the_graph(self, checkpoint: Path, recordings: str):
        images = load_images(load_subject(checkpoint).graph, None, recordings)
        assert images.pixels.shape == (CONFIG.steps, COUNT, 2, 34, 34)
        assert images.events
        assert len(images) == COUNT
        assert images.labels.tolist() == [2, 3, 4]
        assert set(np.unique(images.pixels)) == {0, 1}

    def test_the_first_of_them_keep_all_their_steps(self, checkpoint: Path, recordings: str):
        images = load_images(load_subject(checkpoint).graph, None, recordings)
        few = images.first(2)
        np.testing.assert_array_equal(few.pixels, images.pixels[:, :2])
        assert len(few) == 2

    def test_another_order_of_the_steps_is_another_input(self, checkpoint: Path, recordings: str):
        graph = load_subject(checkpoint).graph
        events = load_images(graph, None, recordings).pixels
        assert not np.array_equal(run(graph, events).logits, run(graph, events[::-1]).logits)


class TestCommands:
    @pytest.mark.parametrize("subject", ["checkpoint", "graph_file"])
    def test_verify_finds_no_difference_in_any_executor(
        self, request: pytest.FixtureRequest, subject: str, recordings: str
    ):
        path = request.getfixturevalue(subject)
        stages = "engine,torch,onnx"
        shown = json.loads(
            invoke("verify", path, "--data", recordings, "--against", stages, "--json")
        )
        assert [stage["images"] for stage in shown["stages"]] == [COUNT] * 3
        assert [stage["spikes_differing"] for stage in shown["stages"]] == [0] * 3
        assert all(stage["spikes_compared"] > 0 for stage in shown["stages"])

    @pytest.mark.lava
    def test_verify_runs_the_lava_network(self, checkpoint: Path, recordings: str):
        shown = invoke(
            "verify", checkpoint, "--data", recordings, "--against", "lava-blocks-inprocess"
        )
        assert "none: equal" in shown

    @pytest.mark.parametrize("backend", ["engine", "torch", "onnx"])
    def test_run_classifies_alike_with_each(self, graph_file: Path, recordings: str, backend: str):
        shown = json.loads(
            invoke("run", graph_file, "--data", recordings, "--backend", backend, "--json")
        )
        graph = load_subject(graph_file).graph
        expected = run(graph, load_images(graph, None, recordings).pixels).classes
        assert shown["classes"] == expected.tolist()

    @pytest.mark.parametrize("images", [0, COUNT])
    def test_onnx_takes_events_of_each_step(
        self, checkpoint: Path, recordings: str, tmp_path: Path, images: int
    ):
        out = tmp_path / "model.onnx"
        shown = json.loads(
            invoke(
                "onnx", checkpoint, "--out", out, "--data", recordings, "--images", images, "--json"
            )
        )
        (entry,) = onnx.load(out).graph.input
        sizes = [axis.dim_value or axis.dim_param for axis in entry.type.tensor_type.shape.dim]
        assert sizes == [CONFIG.steps, "batch", 2, 34, 34]
        assert shown["images"] == images
        assert shown.get("spikes_and_gates_differing", 0) == 0

    def test_energy_counts_the_operations_of_all_steps(self, checkpoint: Path, recordings: str):
        shown = json.loads(
            invoke("energy", checkpoint, "--data", recordings, "--gpu", "none", "--json")
        )
        graph = load_subject(checkpoint).graph
        events = run(graph, load_images(graph, None, recordings).pixels).events
        assert events is not None
        sops = {row["sops"] for row in shown if row["system"] == "SNN, adaptive tokens"}
        assert events.mean("sops") in sops

    def test_exits_leave_recordings_early(self, checkpoint: Path, recordings: str):
        shown = json.loads(
            invoke("exits", checkpoint, "--data", recordings, "--margin", "1e-9", "--json")
        )
        assert [row["leaving"] for row in shown["rows"]] == [[0, 0, COUNT], [COUNT, 0, 0]]

    def test_cores_counts_all_recordings(self, checkpoint: Path, recordings: str):
        shown = json.loads(
            invoke("cores", checkpoint, "--data", recordings, "--gpu", "none", "--json")
        )
        assert shown["images"] == COUNT
        assert shown["neurobench"]["images"] == COUNT


class TestOtherInput:
    def test_a_model_of_images_refuses_recordings(self, recordings: str):
        result = CliRunner().invoke(cli.app, ["verify", "--data", recordings])
        assert result.exit_code == 1
        assert (
            "holds events, the model takes images; give other data, or a model trained with "
            "model.events: true" in " ".join(result.output.split())
        )
