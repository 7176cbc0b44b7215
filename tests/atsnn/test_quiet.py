"""The stem's channel 0 as a detector of quiet tokens: whom it closes, and that it stays."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from spikformers import lively, pixels, small_config
from tiny_runs import run_tiny, tiny_config

from atsnn.checkpoint import load_model
from atsnn.errors import ConfigError
from atsnn.quantization import quantize_model
from atsnn.quiet import detect_quiet_tokens
from atsnn.spikformer import Spikformer

FIXED = {"gamma": 20.0, "beta": -14.0, "block_scores": False}


def quiet_model(share: float) -> tuple[Spikformer, torch.Tensor]:
    config = small_config(merging=False)
    halting = config.halting.model_copy(update={**FIXED, "quiet": share})
    config = config.model_copy(update={"halting": halting})
    model, image = lively(config), pixels(config, 64)
    detect_quiet_tokens(model, image, share)
    return model, image


def spikes_at_first_step(model: Spikformer, image: torch.Tensor) -> torch.Tensor:
    """In front of the position branch, [B, N]."""
    seen = []
    stem = model.stem.stem if model.quantized else model.stem
    stem.pool4.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model(image)
    return seen[0][0].sum(1).flatten(1)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_closes_the_tokens_with_the_fewest_spikes(share: float) -> None:
    model, image = quiet_model(share)
    spikes = spikes_at_first_step(model, image)
    closed = model(image).gates[0, 0] == 0
    assert closed.any()
    assert spikes[closed].max() < spikes[~closed].min()
    without = (spikes == spikes[closed].max()).double().mean()  # what a limit of one more moves
    assert abs(float(closed.double().mean()) - share) <= float(without)


def test_so_does_the_quantised_model() -> None:
    model, image = quiet_model(0.5)
    quantized = quantize_model(model).eval()
    spikes = spikes_at_first_step(quantized, image)
    closed = quantized(image).gates[0, 0] == 0
    assert 0.3 < float(closed.double().mean()) < 0.7
    assert spikes[closed].max() < spikes[~closed].min()


def test_gates_have_no_gradient_so_that_rows_are_left_out() -> None:
    model, image = quiet_model(0.5)
    assert not model.train()(image).gates.requires_grad


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    config = tiny_config(model={"halting": {"enabled": False}})
    return run_tiny(tmp_path_factory.mktemp("start"), config)


def test_training_keeps_the_detector_and_changes_the_rest(tmp_path, start) -> None:
    stages = (
        {"name": "float", "train": {"epochs": 1}},
        {"name": "quantized", "train": {"epochs": 1, "quantized": True}},
    )
    config = tiny_config(
        model={"halting": {**FIXED, "learn": False, "quiet": 0.5}},
        train={"initial": str(start)},
        stages=stages,
    )
    folder = tmp_path / "run"
    run_tiny(folder, config)
    first = load_file(folder / "float" / "model.safetensors")
    last = load_file(folder / "quantized" / "model.safetensors")
    kernel = first["stem.position.synapse.weight"]
    center = kernel[0, 1:, 1, 1]
    assert torch.equal(center, center[0].expand_as(center))  # decay scales all of them
    assert float(center[0]) == pytest.approx(-1.0, abs=0.01)
    assert float(kernel[0].abs().sum()) == pytest.approx(float(center.abs().sum()))
    folded = last["stem.stem.position.synapse.weight"]
    assert folded[0, 1:, 1, 1].std() < 1e-6
    assert not torch.equal(kernel[1], load_file(start)["stem.position.synapse.weight"][1])
    assert last["stem.stem.conv4.synapse.bias"][0] == -1.0
    tokens = float(load_model(folder / "quantized")(torch.rand(32, 1, 8, 8)).average_tokens)
    assert 0.0 < tokens < 1.0


def test_it_needs_a_trained_stem(tmp_path) -> None:
    config = tiny_config(model={"halting": {**FIXED, "quiet": 0.5}})
    with pytest.raises(ConfigError, match=r"spikes of a trained stem: set train\.initial"):
        run_tiny(tmp_path, config)


def test_it_needs_a_float_start(tmp_path, start) -> None:
    stages = ({"name": "q", "train": {"epochs": 1, "quantized": True}},)
    quantized = tiny_config(
        model={"halting": {"enabled": False}}, train={"initial": str(start)}, stages=stages
    )
    run_tiny(tmp_path / "q", quantized)
    config = tiny_config(
        model={"halting": {**FIXED, "quiet": 0.5}},
        train={"initial": str(tmp_path / "q" / "model.safetensors"), "quantized": True},
    )
    with pytest.raises(ConfigError, match=r"starts from a float model, .* is quantised"):
        run_tiny(tmp_path / "again", config)
