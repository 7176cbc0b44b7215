"""The command line `atsnn-export`: what it prints for people and machines, and how it fails."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from atsnn.checkpoint import load_model, save_checkpoint
from atsnn.config import HaltingConfig, MergingConfig, ModelConfig
from atsnn.errors import CheckpointError
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export import cli
from export.errors import LavaUnavailableError
from export.formats import hdf5
from export.spikformer import capture_spikformer, compile_spikformer

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    in_channels=1,
    image_size=(12, 12),
    classes=10,
    steps=2,
    blocks=2,
    dim=16,
    heads=2,
    mlp_ratio=2,
    halting=HaltingConfig(enabled=True, gamma=3.0, beta=-1.2),
    merging=MergingConfig(enabled=True, count=2),
)


def lively_model() -> Spikformer:
    torch.manual_seed(1)
    model = Spikformer(CONFIG)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 0.6)
            module.weight.data.uniform_(0.8, 2.0)
            module.bias.data.uniform_(0.0, 0.8)
    return quantize_model(model.eval())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"), lively_model(), CONFIG)


@pytest.fixture(scope="module")
def graph_file(checkpoint: Path) -> Path:
    return hdf5.save(compile_spikformer(lively_model()), checkpoint.with_name("graph.h5"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 12 training and 8 test images, 12 x 12, in IDX files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("t10k", 8)):
        images = rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def atsnn_export() -> Invoke:
    """Run a command in this process: exit status, standard output, standard error."""

    def invoke(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def parsed(outcome: tuple[int, str, str]):
    status, out, err = outcome
    assert status == 0, err
    return json.loads(out)


class TestCommands:
    def test_graph_writes_the_graph_and_says_what_was_rounded(
        self, atsnn_export: Invoke, checkpoint: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "net.h5"
        summary = parsed(atsnn_export("graph", checkpoint, "--out", out, "--json"))
        assert hdf5.identical(hdf5.load(out), compile_spikformer(lively_model()))
        assert summary["sha256"] == hdf5.content_digest(hdf5.load(out))
        assert summary["quantized"]
        assert len(summary["rounding"]) == 5 + 2 * 7  # synapses of the stem and of two blocks
        assert {"name", "kind", "source", "shape", "depth", "block"} == set(summary["nodes"][0])

    def test_graph_prints_tables(self, atsnn_export: Invoke, checkpoint: Path) -> None:
        status, out, _ = atsnn_export("graph", checkpoint)
        assert status == 0
        assert "blocks.1.attention_neuron" in out
        assert "weight bits" in out

    def test_the_float_graph(self, atsnn_export: Invoke, checkpoint: Path, tmp_path: Path) -> None:
        out = tmp_path / "float.h5"
        summary = parsed(atsnn_export("graph", checkpoint, "--float", "--out", out, "--json"))
        assert not summary["quantized"]
        assert hdf5.identical(hdf5.load(out), capture_spikformer(lively_model()))

    def test_every_backend_gives_the_same_classes(
        self, atsnn_export: Invoke, checkpoint: Path, graph_file: Path, data: Path
    ) -> None:
        runs = [
            parsed(
                atsnn_export(
                    "run", model, "--images", 6, "--data", data, "--backend", name, "--json"
                )
            )
            for name, model in (
                ("engine", checkpoint),
                ("engine", graph_file),
                ("torch", graph_file),
                ("onnx", graph_file),
            )
        ]
        assert {tuple(r["classes"]) for r in runs} == {tuple(runs[0]["classes"])}
        shares = [run["average_tokens"] for run in runs]
        assert shares == pytest.approx([shares[0]] * len(runs))
        assert runs[0]["images"] == 6
        assert 0 < runs[0]["average_tokens"] < 1

    def test_verify(self, atsnn_export: Invoke, checkpoint: Path, data: Path) -> None:
        stages = parsed(
            atsnn_export(
                "verify",
                checkpoint,
                *("--images", 5, "--data", data, "--against", "engine,torch,onnx", "--json"),
            )
        )["stages"]
        assert [(s["from"], s["to"]) for s in stages] == [
            ("quantised torch", "engine"),
            ("engine", "graph in torch"),
            ("engine", "onnxruntime"),
        ]
        for stage in stages:
            assert stage["images"] == 5
            assert stage["spikes_compared"] > 50_000
            assert stage["spikes_differing"] == 0
            assert stage["first_difference"] is None

    def test_verify_fails_on_one_differing_spike(
        self, atsnn_export: Invoke, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, data: Path
    ) -> None:
        import export.spikformer

        genuine = export.spikformer.model_trace

        def altered(model: Spikformer, images: np.ndarray) -> dict[str, np.ndarray]:
            trace = genuine(model, images)
            trace["blocks.1.q.neuron"][1, 2, 3, 4] ^= True
            return trace

        monkeypatch.setattr(export.spikformer, "model_trace", altered)
        status, out, _ = atsnn_export(
            "verify",
            checkpoint,
            *("--images", 3, "--data", data, "--against", "engine", "--json"),
        )
        assert status == 1
        (stage,) = json.loads(out)["stages"]
        assert stage["spikes_differing"] == 1
        first = stage["first_difference"]
        assert (first["node"], first["image"], first["t"]) == ("blocks.1.q.neuron", 2, 1)
        assert first["neuron"] == [3, 4]

    def test_energy(self, atsnn_export: Invoke, checkpoint: Path, data: Path) -> None:
        rows = parsed(
            atsnn_export(
                "energy",
                checkpoint,
                *("--images", 3, "--data", data, "--profile", "loihi1", "--gpu", "modelled"),
                "--json",
            )
        )
        assert len(rows) >= 8
        wanted = {"system", "convention", "grade", "joules_per_image", "sops", "macs"}
        assert all(wanted <= set(row) for row in rows)
        systems = {row["system"] for row in rows}
        assert {"SNN, all tokens", "SNN, adaptive tokens"} <= systems

    def test_energy_of_every_layer(
        self, atsnn_export: Invoke, graph_file: Path, data: Path
    ) -> None:
        status, out, _ = atsnn_export(
            "energy", graph_file, "--images", 2, "--data", data, "--gpu", "none", "--layers"
        )
        assert status == 0
        assert "stem.conv2.synapse" in out
        assert "Energy per image" in out

    def test_onnx(self, atsnn_export: Invoke, checkpoint: Path, tmp_path: Path, data: Path) -> None:
        out = tmp_path / "model.onnx"
        result = parsed(
            atsnn_export("onnx", checkpoint, "--out", out, "--images", 4, "--data", data, "--json")
        )
        assert out.stat().st_size == result["bytes"]
        assert result["largest_logit_difference"] <= 1e-5
        assert result["classes_differing"] == result["spikes_and_gates_differing"] == 0
        assert result["spikes_and_gates_compared"] == 2 * 2 * 4 * 9

    @pytest.mark.lava
    def test_lava_describes_the_network(
        self, atsnn_export: Invoke, checkpoint: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "lava.json"
        description = parsed(
            atsnn_export("lava", checkpoint, "--grain", "blocks", "--out", out, "--json")
        )
        assert json.loads(out.read_text()) == description
        assert [b["block"] for b in description["blocks"]] == ["stem", "block1", "block2", "head"]
        assert description["time_steps_per_image"] == 2

    @pytest.mark.lava
    @pytest.mark.slow
    def test_demo_with_lava(self, atsnn_export: Invoke, checkpoint: Path, data: Path) -> None:
        result = parsed(
            atsnn_export(
                "demo",
                checkpoint,
                *("--images", 8, "--lava-images", 2, "--data", data, "--json"),
            )
        )
        assert [s["to"] for s in result["stages"]] == ["engine", "lava-layers", "lava-blocks"]
        assert all(s["spikes_differing"] == 0 for s in result["stages"])

    @pytest.mark.lava
    def test_verify_in_one_process(
        self, atsnn_export: Invoke, checkpoint: Path, data: Path
    ) -> None:
        options = ("--images", 2, "--against", "lava-blocks-inprocess", "--data", data, "--json")
        (stage,) = parsed(atsnn_export("verify", checkpoint, *options))["stages"]
        assert (stage["from"], stage["to"]) == ("engine", "lava-blocks-inprocess")
        assert stage["spikes_compared"] > 0
        assert stage["spikes_differing"] == 0

    def test_demo_without_lava_says_so_in_one_line(
        self, atsnn_export: Invoke, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, data: Path
    ) -> None:
        import export.lava.run

        def missing() -> None:
            raise LavaUnavailableError("Lava is not installed: make PYTHON=python3.10")

        monkeypatch.setattr(export.lava.run, "check_lava", missing)
        status, out, _ = atsnn_export("demo", checkpoint, "--images", 4, "--data", data)
        assert status == 0
        for part in ("accuracy", "average tokens", "synaptic operations", "Energy per image"):
            assert part in out
        assert "Lava skipped: Lava is not installed: make PYTHON=python3.10" in out


class TestHelp:
    def test_every_option_is_documented(self) -> None:
        group = typer.main.get_command(cli.app)
        for name, command in group.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
            assert command.help, name
            for parameter in command.params:
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"

    def test_every_command_answers_in_json(self) -> None:
        group = typer.main.get_command(cli.app)
        names = set(group.commands)  # pyright: ignore[reportAttributeAccessIssue]
        assert names == {
            "graph", "lava", "onnx", "verify", "run", "energy", "demo",
            "exits", "profiles", "place", "cores", "break-even", "measure-gpu",
        }  # fmt: skip
        for command in group.commands.values():  # pyright: ignore[reportAttributeAccessIssue]
            assert any("--json" in parameter.opts for parameter in command.params)


class TestFailures:
    """One line on stderr, exit status 1, nothing on stdout."""

    @pytest.fixture
    def fails(self, atsnn_export: Invoke) -> Callable[..., str]:
        def run(*arguments: object, status: int = 1) -> str:
            code, out, err = atsnn_export(*arguments)
            assert code == status
            assert out == ""
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            return err

        return run

    def test_no_such_checkpoint(self, fails: Callable[..., str], tmp_path: Path) -> None:
        assert "no such checkpoint" in fails("run", tmp_path / "none.safetensors")

    def test_no_such_graph(self, fails: Callable[..., str], tmp_path: Path) -> None:
        assert "No such file" in fails("run", tmp_path / "none.h5")

    def test_a_damaged_graph(
        self, fails: Callable[..., str], graph_file: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken.h5"
        content = bytearray(graph_file.read_bytes())
        content[5000] ^= 1
        broken.write_bytes(content)
        assert "the file is damaged, get it again" in fails("verify", broken)

    def test_a_float_graph(self, fails: Callable[..., str], tmp_path: Path) -> None:
        path = hdf5.save(capture_spikformer(lively_model()), tmp_path / "float.h5")
        assert "holds a float graph" in fails("run", path)

    def test_images_of_another_size(self, fails: Callable[..., str], graph_file: Path) -> None:
        message = fails("run", graph_file)
        assert "built-in images have shape [1, 28, 28], this network takes [1, 12, 12]" in message

    def test_an_empty_data_folder(
        self, fails: Callable[..., str], graph_file: Path, tmp_path: Path, data: Path
    ) -> None:
        assert "no data set that is known" in fails("run", graph_file, "--data", tmp_path)

    def test_an_unknown_profile(
        self, fails: Callable[..., str], graph_file: Path, data: Path
    ) -> None:
        message = fails(
            *("energy", graph_file, "--images", 1, "--data", data, "--profile", "loihi9")
        )
        assert "loihi9" in message

    def test_a_place_where_nothing_can_be_written(
        self, fails: Callable[..., str], checkpoint: Path
    ) -> None:
        assert "cannot write" in fails("graph", checkpoint, "--out", checkpoint / "net.h5")

    def test_lava_is_missing(
        self, fails: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import export.lava

        def missing() -> None:
            raise LavaUnavailableError("Lava is not installed: pip install 'atsnn[lava]'")

        monkeypatch.setattr(export.lava, "check_lava", missing, raising=False)
        assert "pip install 'atsnn[lava]'" in fails("lava", checkpoint)

    def test_control_c(self, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "_subject", interrupted)
        assert fails("graph", status=130) == "error: interrupted\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ("run", "--backend", "gpu"),
            ("verify", "--against", "engine,brain"),
            ("energy", "--gpu", "mine"),
            ("verify", "--images", "0"),
            ("graph", "--nonsense"),
            ("nonsense",),
        ],
    )
    def test_wrong_usage_exits_with_2(
        self,
        atsnn_export: Invoke,
        arguments: tuple[str, ...],
        graph_file: Path,
        data: Path,
    ) -> None:
        model = () if arguments[0] == "nonsense" else (graph_file,)
        folder = ("--data", data) if arguments[0] == "energy" else ()
        status, out, err = atsnn_export(arguments[0], *model, *arguments[1:], *folder)
        assert status == 2
        assert out == ""
        assert "Error" in err

    def test_a_reader_that_leaves_early(self, graph_file: Path) -> None:
        done = subprocess.run(
            f"{sys.executable} -m export.cli graph {graph_file} | head -n 1",
            shell=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
        assert done.stderr == ""

    def test_as_a_program_too(self, tmp_path: Path) -> None:
        (tmp_path / "broken.h5").write_bytes(b"\x89HDF" * 400)
        done = subprocess.run(
            [sys.executable, "-m", "export.cli", "run", str(tmp_path / "broken.h5")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "does not begin as a graph file" in done.stderr


def test_a_graph_file_has_the_suffix_that_commands_know_it_by(checkpoint: Path, tmp_path: Path):
    result = CliRunner().invoke(
        cli.app, ["graph", str(checkpoint), "--out", str(tmp_path / "x.txt")]
    )
    assert result.exit_code == 2
    assert "a graph file is named *.h5" in " ".join(result.output.replace("│", "").split())
    assert list(tmp_path.iterdir()) == []


def test_a_graph_file_in_place_of_a_checkpoint_is_called_one(graph_file: Path, tmp_path: Path):
    renamed = tmp_path / "model.safetensors"
    renamed.write_bytes(graph_file.read_bytes())
    with pytest.raises(CheckpointError, match="a graph file, no checkpoint: run it with"):
        load_model(renamed)
