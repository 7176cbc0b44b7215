"""Two processes train as one, a killed pair resumes, and only the first one writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import run_tiny, tiny_config

from atsnn import distributed
from atsnn.config import TrainConfig, parse
from atsnn.errors import ConfigError, TrainingError
from atsnn.training import Run, _shares

PAIR = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import atsnn.training
from atsnn import distributed
from atsnn.config import parse, RunConfig
from tiny_runs import run_tiny
import json

folder, config, stop = Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
resume = sys.argv[5] == "resume"
steps, step = 0, atsnn.training.Run._step
def dying(self, indices):
    global steps
    steps += 1
    if steps == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, indices)
atsnn.training.Run._step = dying
written = []
write = atsnn.training.write_tensors
def watched(path, *rest):
    written.append(path)
    return write(path, *rest)
atsnn.training.write_tensors = watched
run_tiny(folder, parse(RunConfig, config, "pair"), resume=resume)
print("written by", os.environ["RANK"], len(written))
"""


def run_pair(folder: Path, config, stop: int = 0, resume: bool = False) -> list[str]:
    """Two gloo processes; returns what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(Path(__file__).parent), str(folder), config.model_dump_json(), str(stop)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, *arguments, "resume" if resume else "start"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    if not stop:
        assert [p.returncode for p in processes] == [0, 0], said
    return [out for out, _ in said]


def assert_close(ours: Path, theirs: Path) -> None:
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.allclose(values, second[name], rtol=1e-3, atol=2e-4), name


def plain(**train_options: object):
    """float32 with losses that see means over the whole batch."""
    options = {"prior_weight": 0.1, "gate_target": 0.2, "clip_norm": 1.0, **train_options}
    return tiny_config(train={"epochs": 1, "lr": 1e-3, **options})


class TestTwoProcesses:
    @pytest.mark.parametrize("order", ["upstream", pytest.param("raster", marks=pytest.mark.slow)])
    def test_train_as_one_does_with_the_same_batch(self, tmp_path: Path, order: str) -> None:
        config = plain()
        halting = config.model.halting.model_copy(update={"order": order})
        model = config.model.model_copy(update={"halting": halting})
        config = config.model_copy(update={"model": model})
        one = run_tiny(tmp_path / "one", config)
        said = run_pair(tmp_path / "two", config)
        assert_close(tmp_path / "two" / one.name, one)
        assert "written by 0 3" in said[0]
        assert "written by 1 0" in said[1]

    @pytest.mark.parametrize("method", ["random", "sparse-spikformer"])
    def test_draw_the_tokens_that_one_process_draws(self, tmp_path: Path, method: str) -> None:
        selection = {"method": method, "keep": [0.5]}
        config = tiny_config(
            model={"halting": {"enabled": False}, "selection": selection},
            train={"epochs": 1, "lr": 1e-3},
        )
        one = run_tiny(tmp_path / "one", config)
        run_pair(tmp_path / "two", config)
        assert_close(tmp_path / "two" / one.name, one)

    @pytest.mark.slow
    def test_a_killed_pair_resumes_to_the_same_bits(self, tmp_path: Path) -> None:
        config = plain()
        run_pair(tmp_path / "whole", config)
        run_pair(tmp_path / "killed", config, stop=4)
        assert (tmp_path / "killed" / "state.safetensors").exists()
        assert not (tmp_path / "killed" / "model.safetensors").exists()
        run_pair(tmp_path / "killed", config, resume=True)
        whole, killed = (
            load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")
        )
        assert all(torch.equal(whole[name], killed[name]) for name in whole)


class TestShares:
    def test_parts_cover_the_batch(self) -> None:
        config = TrainConfig(batch=12, accumulate=3)
        assert _shares(config) == [slice(0, 4), slice(4, 8), slice(8, 12)]

    def test_processes_take_parts_in_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("atsnn.training.processes", lambda: 2)
        monkeypatch.setattr("atsnn.training.rank", lambda: 1)
        assert _shares(TrainConfig(batch=8, accumulate=2)) == [slice(4, 6), slice(6, 8)]

    def test_a_batch_that_does_not_divide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("atsnn.training.processes", lambda: 3)
        with pytest.raises(ConfigError, match=r"train.batch 8 .* 3 processes .* multiple of 6"):
            _shares(TrainConfig(batch=8, accumulate=2))

    def test_a_batch_that_does_not_divide_into_accumulate(self) -> None:
        with pytest.raises(ConfigError, match="batch 8 does not divide into accumulate 3"):
            parse(TrainConfig, {"batch": 8, "accumulate": 3}, "test")


class TestAccumulation:
    def test_gradients_are_those_of_the_whole_batch(self, tmp_path: Path) -> None:
        """With running statistics; in training mode each part has statistics of its own."""

        def gradients(accumulate: int):
            from io import StringIO

            from rich.console import Console
            from tiny_runs import tiny_dataset

            from atsnn.augment import Batch

            config = plain(accumulate=accumulate, prior_weight=0.0, gate_weight=0.0)
            run = Run(config, tiny_dataset(), tmp_path, None, Console(file=StringIO()), None)
            for module in run.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
            images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
            labels = torch.arange(8) % 3
            batch = Batch(images, torch.nn.functional.one_hot(labels, 3).float(), labels)
            torch.manual_seed(0)
            sums = torch.stack([run._backward(batch, share) for share in run.shares]).sum(0)
            return sums, {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}

        torch.manual_seed(3)
        whole_sums, whole = gradients(1)
        torch.manual_seed(3)
        part_sums, parts = gradients(4)
        torch.testing.assert_close(whole_sums, part_sums)
        for name, gradient in whole.items():
            torch.testing.assert_close(gradient, parts[name], rtol=1e-4, atol=1e-6, msg=name)

    def test_runs(self, tmp_path: Path) -> None:
        run_tiny(tmp_path, plain(accumulate=4))
        assert "train_loss" in (tmp_path / "log.csv").read_text()


class TestMixedPrecision:
    def test_trains_with_float32_weights_and_exact_attention(self, tmp_path: Path) -> None:
        weights = load_file(run_tiny(tmp_path, plain(precision="bf16")))
        same = load_file(run_tiny(tmp_path / "float32", plain()))
        assert all(w.dtype == same[n].dtype for n, w in weights.items())
        differing = [n for n, w in weights.items() if not torch.equal(w, same[n])]
        assert differing
        for name, values in weights.items():
            assert torch.isfinite(values.float()).all(), name

    def test_quantised_training_refuses_it(self) -> None:
        with pytest.raises(ConfigError, match="exact integers, which bf16 rounds"):
            parse(TrainConfig, {"quantized": True, "precision": "bf16"}, "test")

    def test_a_loss_that_is_not_finite_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"lower train\.lr"):
            run_tiny(tmp_path, plain(precision="bf16", lr=1e30, clip_norm=0.0))


class TestAlone:
    def test_one_process_is_left_as_it_is(self) -> None:
        values = torch.ones(3, requires_grad=True)
        assert distributed.processes() == 1
        assert distributed.rank() == 0
        assert distributed.sum_over_processes(values) is values
        assert distributed.differentiable_sum(values) is values
        assert distributed.mean_of_all(values) is values
        assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")

    def test_more_processes_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with (
            pytest.raises(ConfigError, match="process 2 on a machine with 1 GPUs"),
            distributed.process_group(torch.device("cuda")),
        ):
            pass
